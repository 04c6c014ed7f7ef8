"""The `midstream` command.

Exit codes: 0 done; 1 an experiment or the build failed; 2 the request was wrong; 3 a model or data set cannot be had.
With `--json` standard output holds exactly one JSON document; everything said to people goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from midstream.errors import MidstreamError, RequestError

if TYPE_CHECKING:
    from midstream.running import Plan, Progress, Run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
models_app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.add_typer(models_app, name="models", help="Models and data: list them, fetch one, train a miniature.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Parameters = Annotated[list[str], typer.Option("-p", "--param", metavar="NAME=VALUE", help="Set a parameter.")]
PresetName = Annotated[str, typer.Option("--preset", help="Which set of parameters to start from.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results; under runs/ unless named.")]
PaperId = Annotated[str, typer.Argument(metavar="ID", help="A paper, as `midstream papers` lists it.")]
PaperIds = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Papers; all with a chapter if none.")]


@app.callback()
def _midstream() -> None:
    """A book that runs: papers on what happens between a model's layers and along its tokens."""


@app.command("papers")
def papers_command(as_json: Json = False) -> None:
    """List the papers with state and run time."""
    from midstream.display import seconds_text
    from midstream.overview import states
    from midstream.papers import parts

    found = states()
    if as_json:
        return _print_json({"parts": parts(), "papers": [asdict(state) for state in found]})
    for part, title in parts().items():
        table = _table(title, "id", "paper", "state", "time")
        for state in (state for state in found if state.part == part):
            time = seconds_text(state.seconds) if state.seconds is not None else ""
            shown = f"{state.state} ({state.preset})" if state.preset else state.state
            table.add_row(state.id, state.title, shown, time)
        _out().print(table)
    return None


@app.command("describe")
def describe_command(id: PaperId, as_json: Json = False) -> None:
    """Show a paper's parameters, presets and claims."""
    from midstream.overview import describe, parameter_rows
    from midstream.papers import paper

    found = describe(paper(id))
    if as_json:
        return _print_json(found)
    out = _out()
    out.print(f"[bold]{escape(found['title'])}[/bold] (arXiv {found['arxiv']}), {found['state']}")
    if "parameters" not in found:
        return None
    table = _table("Parameters", "name", "takes", "default", "meaning")
    for row in parameter_rows(found["parameters"]):
        table.add_row(*map(escape, row))
    out.print(table)
    table = _table("Presets", "name", "purpose", "at most", "needs")
    for name, preset in found["presets"].items():
        limits = f"{preset['minutes']:g} min, {preset['memory_gib']:g} GiB"
        table.add_row(name, escape(preset["purpose"]), limits, escape(preset["needs"]) or "this machine")
    out.print(table)
    for claim in found["claims"]:
        out.print(f"[bold]{escape(claim['id'])}[/bold]: {escape(claim['statement'])}")
    return None


@app.command("run")
def run_command(
    id: PaperId,
    preset: PresetName = "quick",
    param: Parameters = [],  # noqa: B006  (typer reads it, nothing changes it)
    seed: Annotated[int | None, typer.Option("--seed", help="Set the first seed.")] = None,
    out: Out = None,
    timeout: Annotated[float | None, typer.Option("--timeout", metavar="MINUTES", help="Stop after this long.")] = None,
    memory: Annotated[float | None, typer.Option("--memory", metavar="GIB", help="Stop above this much.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute even where a current record exists.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Keep the record in results/ (a preset's only).")] = False,
    as_json: Json = False,
) -> None:
    """Run a chapter's notebook: writes the executed notebook and a record."""
    from midstream import running

    planned = running.plan(
        id,
        preset=preset,
        overrides=_overrides(param, seed),
        out=out,
        minutes=timeout,
        memory_gib=memory,
        policy="fresh" if fresh else "exact",
    )
    if record and not planned.preset:
        raise RequestError(
            "--record keeps only runs with a preset's own parameters in results/; leave out -p and --seed."
        )
    finished = _watched_run(planned)
    kept = running.keep(finished) if record and not finished.stale else None
    if as_json:
        return _print_json({**finished.to_dict(), "kept": str(kept) if kept else None})
    return _print_run(finished, kept)


@app.command("sweep")
def sweep_command(
    id: PaperId,
    grid: Annotated[list[str], typer.Option("-g", "--grid", metavar="NAME=V1,V2", help="Values to try.")] = [],  # noqa: B006
    preset: PresetName = "quick",
    param: Parameters = [],  # noqa: B006
    jobs: Annotated[int | None, typer.Option("--jobs", help="Cells run at once; all cores unless told.")] = None,
    profile: Annotated[str, typer.Option("--profile", help="Where cells run: a folder of profiles/.")] = "local",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Run a grid of parameters through Snakemake; ends in one table and a figure, and resumes where it was stopped."""
    from midstream import sweeping

    planned = sweeping.plan(id, grid, preset=preset, fixed=param, jobs=jobs, profile=profile, out=out)
    count = len(planned.cells)
    with _status(f"{id}: {count} cells") as say:
        swept = sweeping.sweep(
            planned, report=lambda done: say(f"{id}: {done} of {count} cells done"), waiting=_err().print
        )
    if as_json:
        _print_json(swept.to_dict())
    else:
        for label, file in (("table", swept.table), ("figure", swept.figure)):
            if file:
                _out().print(f"{label}: {file}", soft_wrap=True, highlight=False)
    if swept.failed:
        raise MidstreamError(swept.failure)


@app.command("verify")
def verify_command(
    ids: PaperIds = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Only records of this preset.")] = None,
    stale: Annotated[bool, typer.Option("--stale", help="Only records that no longer count.")] = False,
    as_json: Json = False,
) -> None:
    """Compute records again and compare them with what is kept, within stated tolerances."""
    from midstream import verifying

    reports = []
    for target in verifying.targets(ids or [], preset, stale):
        reports.append(verifying.verify(target, _watched_run))
        if not as_json:
            _out().print(reports[-1].sentence, soft_wrap=True, highlight=False, markup=False)
    if as_json:
        _print_json([report.to_dict() for report in reports])
    elif not reports:
        _err().print("There is no such record, so nothing was compared.")
    wrong = [report for report in reports if report.outcome not in ("agrees", "skipped")]
    if wrong:
        raise MidstreamError(f"{len(wrong)} of {len(reports)} records do not agree with what was computed now.")


@app.command("ledger")
def ledger_command(as_json: Json = False) -> None:
    """Show every claim: the paper's number, ours, and both verdicts."""
    from midstream.ledger import ledger

    found = ledger()
    if as_json:
        return _print_json(found.to_dict("records"))
    table = _table("Ledger", "paper", "claim", "paper's number", "ours", "direction", "number", "preset")
    for row in found.to_dict("records"):
        cells = (row[name] for name in ("paper", "statement", "paper_number", "ours", "direction", "number", "preset"))
        table.add_row(*(escape(str(cell)) for cell in cells))
    return _out().print(table)


@models_app.callback(invoke_without_command=True)
def models_command(context: typer.Context, as_json: Json = False) -> None:
    """List the models and data sets with source, licence and size."""
    if context.invoked_subcommand is not None:
        return None
    from midstream import data, training, zoo

    kinds = {"models": zoo.cards(), "data": data.cards()}
    states = training.states()
    if as_json:
        return _print_json(
            {kind: {name: asdict(card) for name, card in cards.items()} for kind, cards in kinds.items()}
            | {"recipes": states}
        )
    for kind, cards in kinds.items():
        table = _table(kind.capitalize(), "name", "what", "licence", "size", "source")
        for name, card in cards.items():
            old = f" ({states[name]})" if states.get(name, "current") != "current" else ""
            table.add_row(*map(escape, (name, card.title, card.licence, card.size, card.source + old)))
        _out().print(table)
    return None


@models_app.command("fetch")
def fetch_command(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Make sure that a model or data set is on this machine."""
    from midstream import data, zoo

    if name in data.cards():
        rows = {split: len(data.load(name, split).table) for split in ("train", "test")}  # type: ignore[arg-type]
        found: dict[str, Any] = {"name": name, "rows": rows}
    else:
        found = {"name": name, "folder": str(zoo.fetch(name))}
    if as_json:
        return _print_json(found)
    return _out().print(f"{name} is here: {found.get('folder') or found['rows']}", soft_wrap=True, highlight=False)


@models_app.command("train")
def train_command(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    out: Annotated[Path | None, typer.Option("--out", help="Write to this folder; trained/ unless named.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="At most so many steps a stage: a try.")] = None,
    ship: Annotated[bool, typer.Option("--ship", help="Replace the weights that come with midstream.")] = False,
    as_json: Json = False,
) -> None:
    """Train one of the repository's miniatures again and measure it beside the one that is shipped."""
    from midstream import training

    planned = training.plan(name, out, steps, ship)
    with _bars(name) as report:
        rows = training.compared(planned.shipped, card := training.train(planned, report))
    if as_json:
        return _print_json({"folder": str(planned.target), "measured": rows, "card": card.model_dump(mode="json")})
    table = _table(f"{card.title}: {card.seconds:.0f} s on {card.device}", "measured", "now", "shipped", "on")
    for row in rows:
        shipped = "" if row["shipped"] is None else f"{row['shipped']:.4g}"
        table.add_row(*map(escape, (row["what"], f"{row['value']:.4g} {row['unit']}", shipped, row["on"])))
    _out().print(table)
    return _out().print(f"weights: {planned.target}", soft_wrap=True, highlight=False, markup=False)


@app.command("book")
def book_command(
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors; pages are counted.")] = False,
) -> None:
    """Build the book: notebooks, then chapters, then HTML."""
    from midstream import book, places

    places.need_checkout()
    book.build(strict=strict)


def main() -> None:
    """Run the command line; errors that have a name end in one sentence and their exit code."""
    try:
        app()
    except MidstreamError as error:
        sys.stderr.write(f"midstream: {' '.join(str(error).split())}\n")
        if "--json" in sys.argv and not _printed:
            _print_json({"error": str(error), "exit_code": error.exit_code})
        sys.exit(error.exit_code)


# ---------------------------------------------------------------- shared by the commands

_printed: list[bool] = []


def _overrides(pairs: Sequence[str], seed: int | None) -> dict[str, Any]:
    from midstream.request import assignments

    found: dict[str, Any] = dict(assignments(pairs, "-p"))
    if seed is not None and "seed" in found:
        raise RequestError("--seed and -p seed= both set the seed; give one of them.")
    return found if seed is None else {**found, "seed": seed}


def _watched_run(planned: Plan) -> Run:
    """Run, with a line of progress on standard error."""
    from midstream import running

    name = planned.paper.id
    with _status(f"{name}: starting") as say:

        def report(progress: Progress) -> None:
            memory = f"{progress.memory / 2**30:.1f} GiB"
            say(f"{name}: cell {progress.cell} of {progress.cells}, {progress.seconds:.0f} s, {memory}")

        return running.run(planned, report=report, waiting=_err().print)


def _print_run(finished: Run, kept: Path | None) -> None:
    from midstream import display

    out = _out()
    out.print(str(display.banner(finished.record, finished.origin, finished.stale)), highlight=False, markup=False)
    table = _table("Claims", "claim", "ours", "direction", "number")
    for claim in finished.record.claims:
        ours = "; ".join(f"{comparison.what}: {comparison.interval}" for comparison in claim.comparisons)
        direction = "stale" if finished.stale else claim.direction
        numbers = "stale" if finished.stale else "; ".join(number.verdict for number in claim.numbers)
        table.add_row(*map(escape, (claim.statement, ours, direction, numbers)))
    out.print(table)
    for label, file in (("notebook", finished.notebook), ("record", finished.record_file), ("kept", kept)):
        if file:
            out.print(f"{label}: {file}", soft_wrap=True, highlight=False, markup=False)
    if not kept:
        _err().print("results/ is unchanged; --record keeps a preset's record there.", highlight=False)


@contextmanager
def _status(first: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error that is kept up to date on a terminal and printed once elsewhere."""
    console = _err()
    if not console.is_terminal:
        console.print(first, highlight=False, markup=False)
        yield lambda text: None
        return
    with console.status(escape(first)) as status:
        yield lambda text: status.update(escape(text))


@contextmanager
def _bars(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar a stage of a training on standard error: live on a terminal, one line a stage elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, tasks = _err(), {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def report(stage: str, step: int, steps: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(escape(f"{name}: {stage}"), total=steps)
                if not console.is_terminal:
                    console.print(f"{name}: {stage}, {steps} steps", highlight=False, markup=False)
            progress.update(tasks[stage], completed=step)

        yield report


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=escape(title), title_justify="left")
    table.columns[0].overflow = "fold"
    return table


def _out() -> Console:
    return Console()


def _err() -> Console:
    return Console(stderr=True)


def _print_json(document: Any) -> None:
    _printed.append(True)
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
