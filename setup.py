"""Builds the native CPU kernels; everything else is in pyproject.toml.

They need a C++17 compiler and nothing else: neither torch nor Python headers (see hfquant/kernels/cpu/torch_abi.h).
Without a compiler the package installs all the same and computes in plain torch. HFQUANT_BUILD=none leaves them out,
HFQUANT_BUILD=scalar builds the plain C++ ones alone, as other processors have them, HFQUANT_BUILD=asan builds all with
AddressSanitizer and UBSan.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


KIND = os.environ.get("HFQUANT_BUILD", "release")
FILES = ["isa_scalar.cpp", "ops.cpp"] if KIND == "scalar" else ["*.cpp"]
SOURCES = sorted(str(path) for name in FILES for path in Path("hfquant/kernels/cpu").glob(name))
HEADERS = sorted(str(path) for path in Path("hfquant/kernels/cpu").glob("*.h"))
# Contracting a product and a sum would round once where the reference rounds twice.
# No code looks at floating-point exceptions; without them a compiler may compute both sides of a choice, in vectors.
# The warnings are about GCC's own headers, which leave undefined vectors undefined.
FLAGS = [
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-uninitialized",
]
FLAGS += ["-Wno-maybe-uninitialized"] if platform.system() == "Linux" else []
FLAGS += ["-DHFQUANT_SCALAR"] if KIND == "scalar" else []
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


class BuildKernels(build_ext):
    """Compiles the sources side by side and gives up quietly: the package works without."""

    def build_extension(self, ext: Extension) -> None:
        """Compile each source in a thread of its own."""
        compile_all = self.compiler.compile

        def compile_one(source: str, options: dict[str, Any]) -> str:
            # The plain C++ kernels take GCC longer than all others together to optimize any further.
            level = [] if "scalar" not in source else ["-O0"] if KIND == "asan" else ["-O2"]
            arguments = options | {"extra_postargs": [*(options.get("extra_postargs") or []), *level]}
            return compile_all([source], **arguments)[0]

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                return list(pool.map(lambda source: compile_one(source, options), sources))

        self.compiler.compile = compile_each
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No symbols: it is not a Python module, ctypes loads it."""
        return []


def extensions() -> list[Extension]:
    """The one extension, where it can be built at all."""
    if KIND == "none" or platform.system() not in ("Linux", "Darwin"):
        return []
    return [
        Extension(
            "hfquant.kernels._cpu",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=[*FLAGS, *(["-O1", "-g1", *SANITIZE] if KIND == "asan" else ["-O3", "-g0"])],
            extra_link_args=SANITIZE if KIND == "asan" else ["-Wl,-s"] if platform.system() == "Linux" else [],
            libraries=["dl"] if platform.system() == "Linux" else [],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
