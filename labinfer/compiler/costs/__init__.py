"""What ops cost on a device: measured tables, the signature each is kept under, and what a step costs by them."""

from labinfer.compiler.costs.predict import StepShape, op_seconds, unknown_ops
from labinfer.compiler.costs.signature import Signer
from labinfer.compiler.costs.table import CostTable, DeviceProfile, LinkProfile, load_profile

__all__ = [
    "CostTable",
    "DeviceProfile",
    "LinkProfile",
    "Signer",
    "StepShape",
    "load_profile",
    "op_seconds",
    "unknown_ops",
]
