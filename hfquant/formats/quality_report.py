"""The quality report: what was done to each layer and what it cost, as ``quality_report.json`` beside the checkpoint.

One JSON object; null stands for numbers that JSON does not have (a layer that lost nothing has infinite SQNR):

    model, algorithm, seconds, peak_memory (bytes), bytes_before, bytes_after, bits_per_weight, coverage (0 to 1)
    layers       one object a weight: name, scheme, method, sqnr_db, output_sqnr_db, rows, losses, note, bits_per_weight
    kept         parameter -> reason
    activations  static, dynamic, weight_only, float -> share of the weights of linear layers, output heads left out
    calibration  batches, tokens, sha256, seed; null without calibration data
    allocation   kind, bits, bytes, error, where bits were chosen under a budget; else null
    quality      what ``evaluation/report.py`` measured, if it did
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfquant.errors import FormatError


REPORT_FILE = "quality_report.json"


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Store ``report`` beside the checkpoint in ``folder``."""
    text = json.dumps(json_ready(report), indent=1, sort_keys=True, allow_nan=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def json_ready(value: Any) -> Any:
    """``value`` with null for numbers that JSON does not have (a layer that lost nothing has infinite SQNR)."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_report(folder: Path) -> dict[str, Any]:
    """The report beside the checkpoint in ``folder``.

    Raises:
        FormatError: If there is none, or it is damaged.
    """
    file = folder / REPORT_FILE
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{file}: no quality report; hfquant quantize writes one beside the checkpoint") from error
    except ValueError as error:
        raise FormatError(f"{file}: not JSON ({error}); the file is damaged") from error
    if not isinstance(report, dict) or not isinstance(report.get("layers"), list):
        raise FormatError(f"{file}: not a quality report of hfquant")
    return report


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What matters most, as label and value."""
    quality, calibration, allocation = report.get("quality"), report.get("calibration"), report.get("allocation")
    rows = [
        ("algorithm", str(report["algorithm"])),
        ("size", f"{report['bytes_before'] / 1e6:.1f} MB → {report['bytes_after'] / 1e6:.1f} MB"),
        ("bits per quantized weight", f"{report['bits_per_weight']:.2f}"),
        ("weights quantized", f"{100 * report['coverage']:.1f} %"),
    ]
    shares = {kind: share for kind, share in (report.get("activations") or {}).items() if share}
    if shares and set(shares) != {"weight_only"}:
        rows.append(("linear layers", ", ".join(f"{100 * share:.1f} % {kind}" for kind, share in shares.items())))
    if quality:
        increase = 100 * (quality["perplexity"] / quality["reference_perplexity"] - 1)
        change = f"{quality['reference_perplexity']:.2f} → {quality['perplexity']:.2f} ({increase:+.1f} %)"
        rows += [
            ("perplexity", change),
            ("mean KL", f"{quality['mean_kl']:.4f} nats"),
            ("same most likely token", f"{100 * quality['top1_agreement']:.1f} %"),
            ("measured on", f"{quality['tokens']} tokens, windows of {quality['context']}"),
        ]
    if allocation:
        loss = f"{allocation['error']:.3g}, measured as {allocation['kind']}"
        rows.append(
            ("bits by budget", f"{allocation['bits']:.3f} per weight of the linear layers; estimated loss {loss}")
        )
    if calibration:
        rows.append(("calibrated on", f"{calibration['tokens']} tokens, sha256 {calibration['sha256'][:16]}…"))
    return [
        *rows,
        ("time", f"{report['seconds']:.0f} s"),
        ("peak memory", f"{report['peak_memory'] / 1e9:.2f} GB"),
    ]


def report_markdown(report: Mapping[str, Any]) -> str:
    """The summary as a Markdown table, for a model card."""
    rows = "\n".join(f"| {label} | {value} |" for label, value in summary_rows(report))
    return f"| quality report | |\n| --- | --- |\n{rows}\n"
