"""What ops cost on a device: measured tables, the signature each is kept under, and what a step costs by them."""

from labinfer.compiler.costs.predict import Costs, Measured, StepShape
from labinfer.compiler.costs.signature import Signer
from labinfer.compiler.costs.table import (
    CostTable,
    DeviceProfile,
    Fingerprint,
    LinkProfile,
    PipelineProfile,
    StreamProfile,
    load_profile,
)

__all__ = [
    "CostTable",
    "Costs",
    "DeviceProfile",
    "Fingerprint",
    "LinkProfile",
    "Measured",
    "PipelineProfile",
    "Signer",
    "StepShape",
    "StreamProfile",
    "load_profile",
]
