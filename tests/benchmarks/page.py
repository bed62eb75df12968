"""`make bench`: the numbers of one run of the benchmarks as a page with pictures."""

from __future__ import annotations

import base64
import html
import json
import platform
import sys
from collections import defaultdict
from pathlib import Path

import pandas as pd

from workbench import plots
from workbench.report.pages import write_page


def main(source: Path) -> None:
    """Write `benchmarks.html` beside the JSON file of pytest-benchmark."""
    content = json.loads(source.read_text())
    groups = defaultdict(list)
    for point in content["benchmarks"]:
        groups[point["group"]].append(point)
    pictures = "".join(picture(group, points) for group, points in groups.items())
    ratios = pd.DataFrame(content["ratios"]).drop(columns="test")
    ratios["value"] = ratios["value"].map("{:.3g}".format)
    machine = content["machine_info"]["cpu"]
    words = (
        f"{machine.get('brand_raw', platform.processor())}, {machine.get('count', '?')} cores, {content['datetime']}"
    )
    body = f"<p>Ratios of times of one run. {html.escape(words)}.</p>{ratios.to_html(index=False, border=0)}{pictures}"
    write_page(source.with_suffix(".html"), title="Benchmarks", body=body)


def picture(group: str, points: list[dict]) -> str:
    """Cost against x, as an image in HTML."""
    info = [point["extra_info"] for point in points]
    scale = [1e3 / each["per"] for each in info]
    quantiles = {q: [p["stats"][q] * s for p, s in zip(points, scale, strict=True)] for q in ("median", "min", "max")}
    figure = plots.line(
        [each["x"] for each in info],
        {"median": quantiles["median"]},
        low={"median": quantiles["min"]},
        high={"median": quantiles["max"]},
        xlabel=info[0]["xlabel"],
        ylabel="milliseconds",
        caption=f"{group[0].upper()}{group[1:]}: median and range of {points[0]['stats']['rounds']} rounds.",
    )
    data = base64.b64encode(figure._repr_png_()).decode("ascii")
    return f'<p><img alt="{html.escape(group)}" src="data:image/png;base64,{data}" /></p>'


if __name__ == "__main__":
    main(Path(sys.argv[1]))
