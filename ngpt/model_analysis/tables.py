"""Results for a person, in a few lines; the file has everything. Imports no torch."""

from collections.abc import Callable, Iterator
from typing import Any

type Rows = Iterator[tuple[str, ...]]


def table(found: dict[str, Any]) -> str:
    """The result of `ngpt.model_analysis.run.measure`, in aligned columns."""
    rows = [*_TABLES[found["what"]](found["results"])]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join([f"{found['what']}: {found['tokens']:,} tokens", *lines])


def shown(interval: dict[str, float | None] | None, digits: int = 4) -> str:
    """value [lower, upper]"""
    if interval is None or interval["value"] is None:
        return "-"
    value, lower, upper = (interval[name] for name in ("value", "lower", "upper"))
    return f"{value:.{digits}g}" + (f" [{lower:.{digits}g}, {upper:.{digits}g}]" if lower is not None and upper is not None else "")


def _snr(results: dict[str, Any]) -> Rows:
    figures = ("product_snr_db", "dot_snr_db", "signal_correlation", "noise_correlation", "averaging_gain_db")
    yield ("linear", "product", *figures)
    for path, found in [*results["kinds"].items(), ("all", results["all"])]:
        for gemm in ("fprop", "dgrad", "wgrad"):
            yield (path, gemm, *(shown(found[gemm][figure], 3) for figure in figures))


def _ptq(results: dict[str, Any]) -> Rows:
    yield ("quantised", "nats per token", "difference", "bits per byte", "difference")
    yield ("nothing", shown(results["unquantised"]["loss"], 5), "", shown(results["unquantised"]["bits_per_byte"], 5))
    for name, arm in results["arms"].items():
        yield (name, *(shown(arm[figure], 5) for figure in ("loss", "difference", "bits_per_byte", "bits_per_byte_difference")))


def _flatness(results: dict[str, Any]) -> Rows:
    yield ("matrices", "step", "radius", "rise of the loss")
    for scope, ways in results["directions"].items():
        for way, found in ways.items():
            for point in found["points"]:
                yield (scope, way, f"{point['radius']:g}", shown(point["loss_change"]))
            yield (scope, way, "curvature", shown(found["curvature"]))
    noise = results["noise"]
    yield ("blocks", "noise", f"{noise['relative_error']:.4g}", shown(noise["loss_change"]))


def _curvature(results: dict[str, Any]) -> Rows:
    yield ("matrices", "top eigenvalue", "residual", "trace")
    for scope, found in results["scopes"].items():
        yield (scope, shown(found["top_eigenvalue"]), f"{found['residual']:.2g}", shown(found["trace"]))


_TABLES: dict[str, Callable[[dict[str, Any]], Rows]] = {"snr": _snr, "ptq": _ptq, "flatness": _flatness, "curvature": _curvature}
