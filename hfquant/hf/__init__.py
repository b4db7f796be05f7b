"""The bridge to Transformers: the only place that knows its internals."""

import transformers

from hfquant.errors import HfQuantError


TESTED_TRANSFORMERS = ("5.17", "5.23")
"""The minor releases whose internals this package is tested against."""


def check_transformers_version(version: str) -> None:
    """Refuse a Transformers whose loading internals were never tested with this package.

    Raises:
        HfQuantError: Naming the tested releases.
    """
    minor = ".".join(version.split(".")[:2])
    if minor not in TESTED_TRANSFORMERS:
        tested = " and ".join(f"{release}.*" for release in TESTED_TRANSFORMERS)
        raise HfQuantError(
            f"transformers {version} is installed; this hfquant is tested with {tested} only and relies on internals "
            f"that change: pip install 'transformers=={TESTED_TRANSFORMERS[-1]}.*'"
        )


check_transformers_version(transformers.__version__)
