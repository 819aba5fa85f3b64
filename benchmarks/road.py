"""Is noisy linear imputation as fast as pytorch-grad-cam's, and does it give the same pixels?

camfn solves for the removed pixels by conjugate gradients on the device of the picture, pytorch-grad-cam by scipy's sparse LU
on the CPU. The picture is smooth with noise on it, and 10 to 90 % of its pixels are removed in the order of a map of 7 x 7
cells, as ROAD does. Seconds are medians of interleaved rounds; a ratio below 1 means that camfn is faster. `all` is the sum
over the shares. `batch` is camfn's time for all shares of several pictures at once, divided by their number.

    python benchmarks/road.py --out benchmarks/results/road.json
"""

import argparse
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from camfn.metrics import linear_imputation

SHARES = tuple(range(10, 100, 10))


def picture(side: int) -> Tensor:
    drawn = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.randn(1, 3, 7, 7, generator=drawn), (side, side), mode="bilinear")
    return smooth + 0.3 * torch.randn(1, 3, side, side, generator=drawn)


def removed(side: int) -> dict[int, Tensor]:
    """The most relevant pixels of a map, by their share in percent."""
    map = F.interpolate(torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(1)), (side, side), mode="bilinear")[0]
    return {share: map >= torch.quantile(map, 1 - share / 100) for share in SHARES}


def peer() -> Any:
    common.torchvision_models()  # which it imports, and which may need help to load
    common.require({"pytorch_grad_cam": "grad-cam"})
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    return NoisyLinearImputer(noise=0.0)


def measure(side: int, rounds: int, device: str, several: int) -> dict[str, Any]:
    x, masks, theirs = picture(side), removed(side), peer()
    there, gone = x.to(device), {share: mask.to(device) for share, mask in masks.items()}
    calls: dict[str, Any] = {}
    for share, mask in masks.items():
        calls[f"camfn {share}"] = lambda share=share: linear_imputation(there, gone[share]).cpu()
        calls[f"pytorch-grad-cam {share}"] = lambda mask=mask: theirs(x[0], (~mask[0]).float())
    whole = there.repeat(several * len(SHARES), 1, 1, 1), torch.cat([*gone.values()] * several)
    calls["batch"] = lambda: linear_imputation(*whole).cpu()
    found = {name: call() for name, call in calls.items()}  # warms up
    off = {share: float((found[f"camfn {share}"][0] - found[f"pytorch-grad-cam {share}"]).abs().max()) for share in SHARES}
    timings = common.interleaved(calls, rounds)

    def total(who: str) -> common.Timing:
        each = [timings[f"{who} {share}"] for share in SHARES]
        return common.Timing(
            *([sum(part) for part in zip(*(getattr(one, name) for one in each))] for name in common.Timing._fields)
        )

    ours, others = total("camfn"), total("pytorch-grad-cam")
    batch = common.Timing(*([second / several for second in part] for part in timings["batch"]))

    def row(us: common.Timing, them: common.Timing) -> dict[str, float]:
        return {"camfn": us.median, "pytorch-grad-cam": them.median, "ratio": common.ratio(us, them)}

    pairs = {share: (timings[f"camfn {share}"], timings[f"pytorch-grad-cam {share}"]) for share in SHARES}
    rows = {str(share): {**row(*pair), "difference": off[share]} for share, pair in pairs.items()}
    rows |= {"all": {**row(ours, others), "difference": max(off.values())}, "batch": row(batch, others)}
    return {"rows": rows, "busy with us": common.share_of_threads(timings.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.positive, default=5)
    parser.add_argument("--side", type=common.positive, default=224, help="side of the picture in pixels")
    parser.add_argument("--pictures", type=common.positive, default=4, help="number of pictures in the batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where camfn runs")
    parser.add_argument("--out", help="write the figures to this file")
    options = parser.parse_args()
    found = measure(options.side, options.rounds, options.device, options.pictures)
    columns = ["percent removed", "camfn, s", "pytorch-grad-cam, s", "ratio", "difference"]
    formats = {"camfn": ".3f", "pytorch-grad-cam": ".3f", "ratio": ".2f", "difference": ".1e"}
    cells = [
        [share, *(format(row[key], how) if key in row else "" for key, how in formats.items())]
        for share, row in found["rows"].items()
    ]
    print(common.table(columns, cells))
    print(f"busy with us: {found['busy with us']:.0%}")
    if options.out:
        where = {**common.environment(["camfn", "grad-cam", "scipy"]), "device": options.device}
        settings = {"side": options.side, "rounds": options.rounds, "pictures": options.pictures}
        common.write(options.out, {"question": __doc__.splitlines()[0], "settings": settings, **found, "environment": where})


if __name__ == "__main__":
    main()
