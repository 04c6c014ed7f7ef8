"""What the hooks cost: `python benchmarks/hooks.py [measure ...] [--json FILE]`.

Every timing is a pair: a plain forward and, right beside it, the same forward under the method; methods take turns.
Shown are medians with quartiles over the pairs. The row `plain again` is the noise floor: differences within its
quartiles mean nothing. Timed is the CPU time of this process on one thread, which is the time that passes on an idle
machine and differs little on a busy one.

nnsight and pyvene (the `bench` extra) each work on a copy of the model of their own, since a model they have wrapped is
slower; where one is not installed, its rows are left out.
"""

import argparse
import copy
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from midstream import zoo
from midstream.hooks import attend, prune, read, route, write

Call = Callable[[], Any]
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table: a method's median with its quartiles, beside what it is to reach."""

    measure: str
    method: str
    unit: str
    low: float
    median: float
    high: float
    target: str = ""
    met: bool | None = None  # None: nothing to reach
    plain_ms: float | None = None


# ------------------------------------------------------------------------------------------------------ measuring


def seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def in_pairs(plain: Call, methods: dict[str, Call], pairs: int) -> dict[str, list[tuple[float, float]]]:
    """(plain, method) seconds of every pair, by method."""
    for call in (plain, *methods.values()):
        call(), call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for number in range(pairs):
        for name, method in methods.items():
            if number % 2:  # the second of two is a little faster, so they change places
                late = seconds(method)
                times[name].append((seconds(plain), late))
            else:
                times[name].append((seconds(plain), seconds(method)))
    return times


def row(measure: str, method: str, unit: str, values: list[float], **more: Any) -> Row:
    low, median, high = statistics.quantiles(values, n=4)
    return Row(measure, method, unit, low, median, high, **more)


def extra_milliseconds(measure: str, times: dict[str, list[tuple[float, float]]], limit: float) -> list[Row]:
    rows = []
    for name, pairs in times.items():
        extra = [1e3 * (method - plain) for plain, method in pairs]
        goal = {"target": f"≤ {limit} ms", "met": statistics.median(extra) <= limit} if name == "midstream" else {}
        rows.append(row(measure, name, "ms over plain", extra, plain_ms=median_plain(pairs), **goal))
    return rows


def ratios(measure: str, times: dict[str, list[tuple[float, float]]], limit: float | None = None) -> list[Row]:
    """Ratios to plain; without a `limit`, the method's median must lie within the quartiles of `plain again`."""
    rows = []
    for name, pairs in times.items():
        values = [method / plain for plain, method in pairs]
        goal: dict[str, Any] = {}
        if name == "midstream":
            bound = limit or statistics.quantiles([b / a for a, b in times["plain again"]], n=4)[2]
            goal = {"target": f"≤ {bound:.3f}", "met": statistics.median(values) <= bound}
        rows.append(row(measure, name, "× plain", values, plain_ms=median_plain(pairs), **goal))
    return rows


def median_plain(pairs: list[tuple[float, float]]) -> float:
    return 1e3 * statistics.median(plain for plain, _ in pairs)


# --------------------------------------------------------------------------------------------------------- models


def toy() -> nn.Module:
    """A Llama of 30 blocks so narrow (64) that Python's own cost shows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=30, **sizes)).eval()


@functools.cache
def smollm2() -> nn.Module:
    model: nn.Module = zoo.load("smollm2").model
    return model


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(0))


def installed(name: str) -> bool:
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed (pip install -e '.[bench]'): its rows are left out", file=sys.stderr)
    return found


# ------------------------------------------------------------------------------------------------- ways of reading


def reading_methods(model: nn.Module, ids: Tensor) -> dict[str, Call]:
    """Each method's way to the output of every block."""
    methods = {
        "plain again": lambda: model(ids),
        "raw hooks": lambda: raw_read(model, ids, lambda x: x),
        "midstream": lambda: midstream_read(model, ids),
        "output_hidden_states": lambda: model(ids, output_hidden_states=True),
    }
    if installed("nnsight"):
        methods["nnsight"] = functools.partial(nnsight_read, nnsight_model(model), ids, lambda x: x)
    if installed("pyvene"):
        methods["pyvene"] = pyvene_reader(copy.deepcopy(model), ids)
    return methods


def raw_read(model: nn.Module, ids: Tensor, keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: kept.append(keep(output)))
        for block in model.model.layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return kept


def midstream_read(model: nn.Module, ids: Tensor, keep: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    with read(model, keep=keep) as reading:
        model(ids)
    return list(reading)


def nnsight_model(model: nn.Module) -> Any:
    from nnsight import NNsight

    return NNsight(copy.deepcopy(model))


def nnsight_read(wrapped: Any, ids: Tensor, keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
    import nnsight

    with wrapped.trace(input_ids=ids):
        kept: list[Tensor] = nnsight.save([keep(block.output) for block in wrapped.model.layers])
    return kept


def pyvene_reader(model: nn.Module, ids: Tensor) -> Call:
    import pyvene

    places = [
        {"component": f"model.layers[{block}].output", "intervention": pyvene.CollectIntervention()}
        for block in range(len(model.model.layers))
    ]
    wrapped = pyvene.IntervenableModel(places, model=model)
    return lambda: wrapped(base={"input_ids": ids})[0][1]


def same_reading(methods: dict[str, Call]) -> None:
    """Every method reads the same bits, or its time is not worth showing."""
    expected = methods["raw hooks"]()
    for name in ("midstream", "nnsight", "pyvene"):
        if name in methods:
            for mine, theirs in zip(methods[name](), expected, strict=True):
                assert torch.equal(mine.reshape(theirs.shape), theirs), name


# ------------------------------------------------------------------------------------------------------- measures


def read_toy() -> list[Row]:
    methods = reading_methods(model := toy(), ids := tokens(1, 16))
    same_reading(methods)
    times = in_pairs(lambda: model(ids), methods, pairs=200)
    return extra_milliseconds("read 30 blocks, toy, 1×16", times, limit=1.0)


def write_toy() -> list[Row]:
    model, ids, step = toy(), tokens(1, 16), torch.ones(64)

    def raw() -> None:
        handle = model.model.layers[15].register_forward_hook(lambda module, args, output: output + step)
        model(ids)
        handle.remove()

    def midstream() -> None:
        with write(model, {("out", 15): lambda x, at: x + step}):
            model(ids)

    methods = {"plain again": lambda: model(ids), "raw hooks": raw, "midstream": midstream}
    if installed("nnsight"):
        wrapped = nnsight_model(model)

        def through_nnsight() -> None:
            with wrapped.trace(input_ids=ids):
                wrapped.model.layers[15].output = wrapped.model.layers[15].output + step

        methods["nnsight"] = through_nnsight
    return extra_milliseconds("write 1 block, toy, 1×16", in_pairs(lambda: model(ids), methods, pairs=200), limit=1.0)


def read_smollm2() -> list[Row]:
    rows = []
    for shape, pairs in (((1, 16), 41), ((4, 128), 7)):
        methods = reading_methods(model := smollm2(), ids := tokens(*shape))
        same_reading(methods)
        rows += ratios(f"read 30 blocks, SmolLM2, {shape[0]}×{shape[1]}", in_pairs(lambda: model(ids), methods, pairs))
    return rows


def attention_row() -> list[Row]:
    """One layer's last attention row, the other layers on sdpa."""
    model, ids, seen = smollm2(), tokens(2, 512), {}

    def look() -> None:
        with attend(model, layers=[15], probs=lambda x, at: seen.update(row=x[:, :, -1].clone())):
            model(ids)

    methods = {"plain again": lambda: model(ids), "midstream": look}
    times = in_pairs(lambda: model(ids), methods, pairs=9)
    return ratios("last attention row of one layer, SmolLM2, 2×512", times, limit=1.03)


def attention_all() -> list[Row]:
    """Every layer's whole attention, against a model that is eager throughout."""
    model, ids = smollm2(), tokens(2, 256)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")

    def look() -> None:
        with attend(model, probs=lambda x, at: None):
            model(ids)

    methods = {
        "plain again": lambda: model(ids),
        "midstream, all layers": look,
        "eager model, output_attentions": lambda: eager(ids, output_attentions=True),
    }
    return ratios("all attention, SmolLM2, 2×256", in_pairs(lambda: model(ids), methods, pairs=7))


def savings() -> list[Row]:
    """Time saved by pruning and skipping beside the FLOPs saved."""
    model, ids = smollm2(), tokens(2, 256)
    half = torch.arange(0, 256, 2)

    def pruned() -> None:
        with prune(model, at=2, select=lambda x: half):
            model(ids)

    def skipped() -> None:
        with route(model, skip=range(8, 23)):
            model(ids)

    rows = []
    for measure, call in (("prune half the tokens after block 2", pruned), ("skip 15 of 30 blocks", skipped)):
        share = operations(call) / operations(lambda: model(ids))
        times = in_pairs(lambda: model(ids), {"midstream": call}, pairs=9)
        rows += ratios(f"{measure}, SmolLM2, 2×256", times, limit=share + 0.05)
        rows.append(Row(measure, "FLOPs (counted by PyTorch)", "× plain", share, share, share))
    return rows


def operations(call: Call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------- memory and imports


def memory() -> list[Row]:
    """Peak memory above a plain forward's, each in a fresh process whose allocator gives freed memory back at once."""
    if not Path("/proc/self/clear_refs").exists():
        print("memory is measured on Linux only: its rows are left out", file=sys.stderr)
        return []
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    methods = ["plain", "all blocks kept", "midstream", "raw hooks, a view"]
    methods += ["nnsight"] if installed("nnsight") else []
    peaks = {}
    for method in methods:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peaks[method] = process.submit(peak, method).result()
    measure, plain, rows = "last token of 30 blocks, SmolLM2, 4×512", statistics.median(peaks.pop("plain")), []
    for method, values in peaks.items():
        extra = [(value - plain) / MIB for value in values]
        goal = {"target": "≤ 1 MiB", "met": statistics.median(extra) <= 1} if method == "midstream" else {}
        rows.append(row(measure, method, "MiB over plain", extra, **goal))
    return rows


@torch.no_grad()
def peak(method: str) -> list[int]:
    """Bytes by which the process grows at its peak in one forward, three times."""
    torch.set_num_threads(1)
    model, ids = copy.deepcopy(smollm2()), tokens(4, 512)  # in memory, since pages mapped from a file come and go
    smollm2.cache_clear()
    calls: dict[str, Call] = {
        "plain": lambda: model(ids),
        "all blocks kept": lambda: raw_read(model, ids, lambda x: x),
        "midstream": lambda: midstream_read(model, ids, lambda x: x[:, -1]),
        "raw hooks, a view": lambda: raw_read(model, ids, lambda x: x[:, -1]),
    }
    if method == "nnsight":
        wrapped = nnsight_model(model)
        calls["nnsight"] = lambda: nnsight_read(wrapped, ids, lambda x: x[:, -1].clone())
    calls["plain"]()
    peaks = []
    for _ in range(3):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status("VmRSS")
        calls[method]()
        peaks.append(status("VmHWM") - before)
    return peaks


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def imports() -> list[Row]:
    """Import time on top of torch and of the part of transformers that every model needs."""
    times: dict[str, list[float]] = {}
    for name in ["midstream.hooks", *filter(installed, ("nnsight", "pyvene"))]:
        code = (
            "import time, torch, transformers; from transformers import PreTrainedModel; start = time.perf_counter(); "
            f"import {name}; print('seconds', time.perf_counter() - start)"
        )
        for _ in range(5):
            output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            times.setdefault(name, []).append(float(output.split()[-1]))
    rows = []
    for name, values in times.items():
        goal = {"target": "≤ 0.1 s", "met": statistics.median(values) <= 0.1} if name == "midstream.hooks" else {}
        rows.append(row("import", name, "s", values, **goal))
    return rows


# ------------------------------------------------------------------------------------------------------------ main

MEASURES = {
    measure.__name__: measure
    for measure in (read_toy, write_toy, read_smollm2, attention_row, attention_all, savings, memory, imports)
}


def line(row: Row) -> str:
    verdict = {None: "", True: "met", False: "NOT MET"}[row.met]
    plain = "" if row.plain_ms is None else f"{row.plain_ms:.1f} ms"
    spread = f"{row.median:9.3f}  ({row.low:.3f} to {row.high:.3f})"
    return f"{row.measure:50} {row.method:32} {spread:32} {row.unit:16} {plain:>11}  {row.target:10} {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("measures", nargs="*", help=f"which to take (default: all): {', '.join(MEASURES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args()
    if unknown := set(arguments.measures) - set(MEASURES):
        parser.error(f"no such measure: {', '.join(sorted(unknown))}; there are: {', '.join(MEASURES)}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    with torch.no_grad():
        for name in arguments.measures or MEASURES:
            taken = MEASURES[name]()
            print("\n".join(map(line, taken)), flush=True)
            rows += taken
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
