"""Compiles kernels with numba to object files: ``python -m labinfer.backends.cpu.build FOLDER NAME...``.

A process of its own, started by ``machine_code``; it prints each name when its file is there. What numba makes of a
kernel is cut down to one function, ``kernel``, with C's way of calling and nothing of Python in it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from labinfer.backends.cpu.exports import export
from labinfer.backends.cpu.isa import compile_kernel
from labinfer.backends.cpu.machine_code import object_path
from labinfer.backends.cpu.object_file import SYMBOL

_LLVM_TYPES = {"int64": "i64", "float64": "double"}

_WRAPPER = """
define {result} @{symbol}({parameters}) {{
  %result = alloca i64
  %error = alloca ptr
  call i32 @"{native}"(ptr %result, ptr %error, {arguments})
  {returned}
}}
"""
"""numba's functions write their result to memory and return a status, which for these kernels is always 0."""


def object_code(name: str) -> bytes:
    """The object file of the kernel called ``name``."""
    function, signature = export(name)
    result = compile_kernel(function, signature)
    module = llvm.parse_assembly(result.library.get_llvm_str() + _wrapper(result.fndesc.llvm_func_name, signature))
    for defined in module.functions:
        if not defined.is_declaration and defined.name != SYMBOL:
            defined.linkage = "internal"
    triple, cpu, features = result.library.codegen.magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu, features, 3, "pic", "small")
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    code: bytes = machine.emit_object(module)
    return code


def _wrapper(native: str, signature: Any) -> str:
    types = [_LLVM_TYPES[str(argument)] for argument in signature.args]
    result = _LLVM_TYPES.get(str(signature.return_type), "void")
    return _WRAPPER.format(
        result=result,
        symbol=SYMBOL,
        parameters=", ".join(f"{kind} %a{i}" for i, kind in enumerate(types)),
        native=native,
        arguments=", ".join(f"{kind} %a{i}" for i, kind in enumerate(types)),
        returned="ret void" if result == "void" else f"%value = load {result}, ptr %result\n  ret {result} %value",
    )


def main(folder: Path, names: list[str]) -> None:
    """Write the object file of every name, whole or not at all."""
    for name in names:
        path = object_path(name, folder)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(object_code(name))
        part.replace(path)
        print(name, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
