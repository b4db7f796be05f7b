"""Builds Triton kernels for GPUs that are not here, with the assembler and disassembler of Triton's own wheel."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
"""Compute capability -> dynamic shared memory that one block may have; the assembler does not check it."""


@dataclass(frozen=True)
class Built:
    """What came out of the compiler for one target."""

    registers: int
    spilled: int
    shared: int
    instructions: list[str]
    ptx: str

    def has(self, pattern: str) -> bool:
        """Whether an instruction matches."""
        return any(re.search(pattern, line) for line in self.instructions)

    def loop(self) -> list[str]:
        """Instructions of the longest loop; a wait that stands behind the end of the program and jumps back is none."""
        return max((s for s in map(self._within, self._loops()) if "EXIT" not in s), key=len, default=[])

    def _within(self, span: tuple[int, int]) -> list[str]:
        return self.instructions[slice(*span)]

    def _loops(self) -> list[tuple[int, int]]:
        labels, spans = {}, []
        for position, line in enumerate(self.instructions):
            if label := re.fullmatch(r"\.(L_x_\d+):", line):
                labels[label.group(1)] = position
            elif (jump := re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)) and jump.group(1) in labels:
                spans.append((labels[jump.group(1)], position + 1))
        return spans

    def opcodes(self) -> Counter[str]:
        """How often each instruction stands in the longest loop."""
        words = (line.split() for line in self.loop())
        return Counter((w[1] if w[0].startswith("@") else w[0]).split(".")[0] for w in words)


def compile_kernel(kernel: Any, arguments: dict[str, Any], capability: int, **options: Any) -> Built:
    """Compile ``kernel`` for one target.

    Args:
        kernel: The jitted function.
        arguments: Name -> type (``"*bf16"``, ``"i32"``) for run-time arguments, or the value of a constant. As at run
            time, pointers and the integers named in ``divisible`` are taken as multiples of 16.
        capability: 80 for sm_80.
        options: ``num_warps``, ``divisible`` and so on.
    """
    names, divisible = list(kernel.arg_names), options.pop("divisible", ())
    types = {n: v for n, v in arguments.items() if isinstance(v, str)}
    constants = {(names.index(n),): v for n, v in arguments.items() if not isinstance(v, str)}
    aligned = [n for n in types if types[n].startswith("*") or n in divisible]
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, listing = (_tool(*command, file.name) for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL"))
    lines = re.findall(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;|(\.L_x_\d+:))", listing, flags=re.MULTILINE)
    instructions = [instruction or label for instruction, label in lines]
    return Built(registers, stack + local, built.metadata.shared, instructions, built.asm["ptx"])


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
