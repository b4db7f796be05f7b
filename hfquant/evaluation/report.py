"""The quality report: measured on text, and shown as a page; the file is ``formats/quality_report.py``."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.evaluation.compare import sequence_loss, token_log_probabilities
from hfquant.evaluation.perplexity import windows
from hfquant.formats.quality_report import summary_rows
from hfquant.numerics.metrics import log_probability_kl


KL_BIN_EDGES = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, float("inf"))
"""In nats: divergences of single positions spread over many orders of magnitude."""

WIDTH, BAR_HEIGHT, LABEL_WIDTH = 860, 14, 330


@torch.no_grad()
def measure_quality(
    reference: nn.Module, model: nn.Module, token_ids: Tensor, *, context: int = 512, progress: bool = True
) -> dict[str, Any]:
    """Perplexity of both, divergence and agreement, with the distribution of the divergence over positions.

    Args:
        reference: The original.
        model: The quantized one.
        token_ids: The text ``[T]``, int64.
        context: Tokens in a window.
        progress: Show a progress bar.
    """
    losses, divergences, same = torch.zeros(2, dtype=torch.float64), [], 0
    for window in tqdm(list(windows(token_ids, context)), desc="Measuring", unit="window", disable=not progress):
        theirs, ours = token_log_probabilities(reference, window), token_log_probabilities(model, window)
        losses += torch.tensor([sequence_loss(theirs, window), sequence_loss(ours, window)], dtype=torch.float64)
        theirs = theirs.to(ours.device)
        divergences.append(log_probability_kl(theirs, ours).cpu())
        same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
    divergence = torch.cat(divergences)
    count = divergence.numel()
    counts = torch.histogram(divergence.double().clamp_min(0), torch.tensor(KL_BIN_EDGES, dtype=torch.float64)).hist
    return {
        "reference_perplexity": float((losses[0] / count).exp()),
        "perplexity": float((losses[1] / count).exp()),
        "mean_kl": float(divergence.double().mean()),
        "kl_quantiles": {str(q): float(divergence.quantile(q)) for q in (0.5, 0.9, 0.99)},
        "kl_counts": [int(value) for value in counts],
        "top1_agreement": same / count,
        "tokens": count,
        "context": context,
    }


def report_html(report: Mapping[str, Any]) -> str:
    """One self-contained page: the summary, plots, and every layer."""
    title = html.escape(f"{report.get('model') or 'model'}, quantized")
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in summary_rows(report))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<main><h1>{title}</h1><table class=summary>{rows}</table>{_plots(report)}{_layer_table(report)}</main></html>"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#1c2330;background:#f6f7f9;margin:0}"
    "main{max-width:920px;margin:0 auto;padding:24px 28px 60px;background:#fff}"
    "h1{font-size:22px;margin:8px 0 16px;overflow-wrap:anywhere}h2{font-size:17px;margin:34px 0 4px}"
    "p{color:#5a6475;margin:0 0 10px;max-width:70ch}table{border-collapse:collapse}"
    "th,td{text-align:left;padding:3px 14px 3px 0;vertical-align:top;border-bottom:1px solid #eceff3}"
    ".summary th{font-weight:500;color:#5a6475}.layers{font-size:13px;width:100%}"
    ".layers td:nth-child(n+4):nth-child(-n+6){text-align:right;font-variant-numeric:tabular-nums}"
    ".layers td:nth-child(2){white-space:nowrap}.scroll{overflow-x:auto}"
    "svg text{font:11px system-ui,sans-serif;fill:#1c2330}"
)

COLORS = {"gptq": "#3b6fd4", "signround": "#2a9d6f", "weighted": "#d98b2b", "search": "#8a93a3", "rtn": "#b9bfca"}


def _plots(report: Mapping[str, Any]) -> str:
    layers = report["layers"]
    parts = []
    measured = [layer for layer in layers if layer["output_sqnr_db"] is not None]
    if measured:
        error = [(layer["name"], layer["output_sqnr_db"], layer["method"]) for layer in measured]
        parts.append(_section("Error by layer", _ERROR_TEXT, _legend(measured) + _bars(error, "{:.1f} dB")))
    if layers:
        bits = [(layer["name"], float(layer["bits_per_weight"]), layer["method"]) for layer in layers]
        least, most = min(value for _, value, _ in bits), max(value for _, value, _ in bits)
        same = most - least < 0.1
        value = f"{least:.2f}" if f"{least:.2f}" == f"{most:.2f}" else f"{least:.2f} to {most:.2f}"
        text = f"{value} bits per weight in all layers, scales included." if same else _BITS_TEXT
        parts.append(_section("Bits by layer", text, "" if same else _bars(bits, "{:.2f}")))
    quality = report.get("quality")
    if quality:
        edges = [f"{low:g} – {high:g}" for low, high in zip(KL_BIN_EDGES, KL_BIN_EDGES[1:], strict=False)]
        edges[-1] = f"over {KL_BIN_EDGES[-2]:g}"
        shares = [100 * value / quality["tokens"] for value in quality["kl_counts"]]
        bars = _bars([(edge, share, "gptq") for edge, share in zip(edges, shares, strict=True)], "{:.1f} %")
        parts.insert(0, _section("How far each prediction moved", _KL_TEXT, bars))
    return "".join(parts)


_ERROR_TEXT = (
    "Signal to noise of each layer's output on held-out calibration tokens, in decibels: higher is better; "
    "10 dB more is a tenth of the squared error."
)
_BITS_TEXT = "Bits per weight, scales included."
_KL_TEXT = "Share of positions by KL divergence (nats) between the original's prediction and the quantized model's."


def _section(title: str, text: str, content: str) -> str:
    return f"<h2>{title}</h2><p>{text}</p><div class=scroll>{content}</div>"


def _legend(layers: Sequence[Mapping[str, Any]]) -> str:
    methods = sorted({layer["method"] for layer in layers})
    squares = (f'<span style="color:{_color(method)}">■</span> {html.escape(method)} &nbsp; ' for method in methods)
    return f"<p>{''.join(squares)}</p>"


def _color(method: str) -> str:
    return COLORS.get(method, "#8a93a3")


def _bars(rows: Sequence[tuple[str, float, str]], form: str) -> str:
    """Horizontal bars with labels, as SVG."""
    most = max((value for _, value, _ in rows if value < float("inf")), default=1.0) or 1.0
    room = WIDTH - LABEL_WIDTH - 70
    parts = []
    for index, (label, value, method) in enumerate(rows):
        y = index * (BAR_HEIGHT + 3)
        length = max(0.0, min(value, most)) / most * room
        short = label if len(label) <= 52 else "…" + label[-51:]
        parts.append(
            f'<text x="{LABEL_WIDTH - 8}" y="{y + 11}" text-anchor="end">{html.escape(short)}</text>'
            f'<rect x="{LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT}" fill="{_color(method)}" />'
            f'<text x="{LABEL_WIDTH + length + 6:.1f}" y="{y + 11}">{form.format(value)}</text>'
        )
    height = len(rows) * (BAR_HEIGHT + 3)
    return f'<svg width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _layer_table(report: Mapping[str, Any]) -> str:
    names = ("layer", "scheme", "method", "weight dB", "output dB", "rows", "note")
    header = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for layer in report["layers"]:
        output = "" if layer["output_sqnr_db"] is None else f"{layer['output_sqnr_db']:.1f}"
        weight = "" if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.1f}"
        cells = (layer["name"], layer["scheme"], layer["method"], weight, output, layer["rows"], layer["note"])
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    kept = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in report["kept"].items())
    tables = f"<div class=scroll><table class=layers><tr>{header}</tr>{''.join(rows)}</table></div>"
    return f"<h2>Every layer</h2>{tables}<h2>Kept in float</h2><div class=scroll><table>{kept}</table></div>"
