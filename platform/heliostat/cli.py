"""The command line: each command is one call; nothing is decided here but how an answer is shown.

Heavy modules are imported by the command that needs them, so that `--help` answers at once.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.core.commands import command, note_given, run_again
from heliostat.core.credentials import keep_passwords_out_of_sight, redacted
from heliostat.core.disk import disk_error, with_advice
from heliostat.errors import HeliostatError

if TYPE_CHECKING:
    from rich.console import Console

    from heliostat.core.outcome import RunResult
    from heliostat.core.plan import Plan

INTERRUPTED = 130

app = typer.Typer(
    name="heliostat",
    help="Search, train and compress a model: one YAML file, one command, on Ray, reviewed in MLflow.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cluster_app = typer.Typer(help="Bring a cluster up or down, look at it, or check its file.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")

File = Annotated[Path, typer.Argument(metavar="FILE", help="The pipeline file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a value: stages.train.config.epochs=3. Repeatable."),
]
Force = Annotated[
    list[str] | None, typer.Option("--force", metavar="STAGE", help="Run this stage again, and what needs it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
Storage = Annotated[Path, typer.Option("--storage", metavar="S", help="The store.")]
ClusterFile = Annotated[Path, typer.Argument(metavar="FILE", help="A Ray cluster YAML.", show_default=False)]
LOG_WIDTH = 160
"""Columns where the output is no terminal."""
DEFAULT_STORE = Path(".heliostat")


def _console(*, error: bool = False) -> "Console":
    from rich.console import Console

    console = Console(stderr=error)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(redacted(document), indent=1, ensure_ascii=False) + "\n")
    sys.stdout.flush()


@contextmanager
def _only_the_answer_on_stdout(as_json: bool) -> Iterator[None]:
    """What the user's own modules print goes to standard error where standard output is for one JSON document."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


@app.command()
def run(
    file: File,
    settings: Settings = None,
    address: Annotated[str | None, typer.Option(metavar="A", help="A running Ray: auto, host:port, ray://…")] = None,
    force: Force = None,
    trial: Annotated[
        str | None,
        typer.Option(metavar="[NODE/]ID", help="Only run this trial of a search again, and show what differs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline: what is done is reused, what was interrupted goes on."""
    note_given(file, settings, address=address, force=force)
    if trial is not None:
        _run_trial(file, trial, settings=settings or (), address=address, force=force or (), as_json=as_json)
        return
    from heliostat import runner
    from heliostat.report.documents import run_document
    from heliostat.report.live import LiveView, PlainView

    terminal = _console(error=True)
    watched: LiveView | PlainView = LiveView(terminal) if terminal.is_terminal else PlainView(terminal)
    with _only_the_answer_on_stdout(as_json):
        pipeline = runner.load_pipeline(file, settings=settings or ())
        with watched as view:
            result = runner.run(pipeline, address=address, force=force or (), view=view)
    if as_json:
        _print_json(run_document(result))
    else:
        _show_result(result, pipeline.task.metrics[0].name if pipeline.task.metrics else None)
    raise typer.Exit({"done": 0, "failed": 1, "interrupted": INTERRUPTED}[result.status])


def _run_trial(
    file: Path, trial: str, *, settings: Sequence[str], address: str | None, force: Sequence[str], as_json: bool
) -> None:
    from heliostat.core.load import load_pipeline
    from heliostat.errors import SpecError
    from heliostat.report.documents import rerun_document
    from heliostat.report.text import rerun_table
    from heliostat.rerun import run_trial

    if force:
        raise SpecError("--force: a trial that is run again changes nothing of what is done; leave it out")
    with _only_the_answer_on_stdout(as_json):
        rerun = run_trial(load_pipeline(file, settings=settings), trial, address=address)
    if as_json:
        _print_json(rerun_document(rerun))
    else:
        _console().print(rerun_table(rerun))


def _show_result(result: "RunResult", metric: str | None) -> None:
    from heliostat.core.artifact import read_record
    from heliostat.report.text import candidates_table, next_step

    console = _console()
    if result.selected is not None:
        record = read_record(Path(result.selected["path"]))
        assert record is not None
        console.print(candidates_table(record.details["table"], metric, width=console.width))
        console.print(f"chosen: {result.selected['node']}", markup=False, style="bold")
        console.print(f"        {result.selected['path']}", markup=False, soft_wrap=True, highlight=False)
    for node in result.nodes:
        if node.status == "failed":
            console.print(f"{node.name} failed: {node.error}", markup=False, style="red", soft_wrap=True)
    if result.status == "interrupted":
        kept = sum(node.status in {"ran", "reused"} for node in result.nodes)
        console.print(f"interrupted: {kept} of {len(result.nodes)} nodes are done and kept, and so are finished trials")
        console.print(f"resume with: {run_again()}", markup=False, soft_wrap=True, highlight=False)
    elif result.status == "failed":
        console.print(f"fix it, then run: {run_again()}", markup=False, soft_wrap=True, highlight=False)
    else:
        console.print(f"next: {next_step(result)}", markup=False, soft_wrap=True, highlight=False)


@app.command()
def plan(file: File, settings: Settings = None, force: Force = None, as_json: AsJson = False) -> None:
    """Show what would run, what is reused and why, how much work that is, and whether it fits this machine."""
    from heliostat import runner
    from heliostat.errors import ResourceError
    from heliostat.report.documents import plan_document

    note_given(file, settings, force=force)
    with _only_the_answer_on_stdout(as_json):
        planned = runner.plan(runner.load_pipeline(file, settings=settings or ()), force=force or ())
    why_not: ResourceError | None = None
    try:
        runner.check_fits_here(planned)
    except ResourceError as error:
        why_not = error
    if as_json:
        _print_json(plan_document(planned, why_not=str(why_not) if why_not else None))
    else:
        _show_plan(planned)
    if why_not is not None:
        raise why_not


def _show_plan(planned: "Plan") -> None:
    from heliostat.report.documents import estimate, workload
    from heliostat.report.text import duration, table_of

    console = _console()
    rows = []
    for node in planned.nodes:
        work = ", ".join(f"{count} {name}" for name, count in workload(node).items()) if node.status == "run" else ""
        rows.append((node.name, node.uses, node.status, node.reason, work))
    console.print(table_of(("node", "uses", "", "why", "work at most"), rows))
    for node in planned.nodes:
        for place, text in node.explained.items():
            console.print(f"{node.name}, {place}: {text}", markup=False)
    total = estimate(planned)
    known = f"about {duration(total['seconds'])}" if total["seconds"] is not None else "no earlier run to estimate from"
    console.print(
        f"{total['nodes_to_run']} nodes to run, {total['trials']} trials, at most {total['epochs']} epochs; {known}"
    )
    if total["nodes_to_run"] and total["cpu_hours"] is not None:
        console.print(f"about {total['cpu_hours']:.3g} CPU hours")


@app.command()
def runs(storage: Storage = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List the runs of a store, newest first."""
    from heliostat.report.runs import check_store, read_runs
    from heliostat.report.text import table_of

    check_store(storage)
    documents = read_runs(storage)
    if as_json:
        _print_json(documents)
        return
    rows = []
    for document in documents:
        states = [node["status"] for node in document["nodes"]]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("ran", "reused", "failed", "skipped") if s in states)
        chosen = (document["selected"] or {}).get("node", "")
        rows.append((document["run"], document["status"], counts, chosen))
    _console().print(table_of(("run", "status", "nodes", "chosen"), rows))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run, or a node's name, fingerprint or folder.")],
    storage: Storage = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show one run, or one node: its metrics, parameters, inputs, files, and what its stage found out."""
    from heliostat.report.details import detail_tables
    from heliostat.report.documents import record_document
    from heliostat.report.runs import check_store, find
    from heliostat.report.text import table_of

    check_store(storage)
    found = find(storage, name)
    document = found if isinstance(found, dict) else record_document(found[1], str(found[0]))
    if as_json:
        _print_json(document)
        return
    console = _console()
    if "nodes" in document:
        rows = [(n["name"], n["status"], n["seconds"], n["path"]) for n in document["nodes"]]
        console.print(f"{document['run']}: {document['status']}", markup=False)
        console.print(table_of(("node", "status", "seconds", "folder"), rows))
        for node in document["nodes"]:
            if reason := node.get("error"):
                console.print(f"{node['name']} {node['status']}: {reason}", markup=False, soft_wrap=True)
        return
    console.print(f"{document['node']} ({document['uses']}), {document['started_at']}", markup=False, style="bold")
    console.print(document["path"], markup=False, soft_wrap=True, highlight=False)
    for part in ("metrics", "params", "inputs", "files", "versions"):
        if document[part]:
            console.print(table_of((part, ""), list(document[part].items())))
    for table in detail_tables(document["details"], width=console.width):
        console.print(table)


@app.command()
def ui(
    storage: Storage = DEFAULT_STORE,
    port: Annotated[int, typer.Option(help="The port on this machine.")] = 5000,
) -> None:
    """Serve the MLflow pages of a store, on this machine only."""
    import subprocess

    from heliostat.errors import SpecError
    from heliostat.report.runs import check_store
    from heliostat.tracking import ui as pages
    from heliostat.tracking.quiet import environment

    check_store(storage)
    database = (storage / "mlflow.db").resolve()
    if not database.is_file():
        raise SpecError(
            f"--storage {storage}: no run of this store is tracked in it ({database.name} is missing); if its file has "
            "a tracking.uri, open that"
        )
    raise typer.Exit(subprocess.call(pages.command(f"sqlite:///{database}", port=port), env=environment()))


@app.command()
def submit(
    file: File,
    address: Annotated[str, typer.Option(metavar="URL", help="The cluster's dashboard: http://HEAD:8265.")],
    settings: Settings = None,
    follow: Annotated[bool, typer.Option(help="Stream the output until the job ends.")] = True,
) -> None:
    """Run a pipeline as a job on a cluster. It goes on when this terminal closes."""
    from heliostat.runner import load_pipeline
    from heliostat.runtime import jobs

    note_given(file, settings, address=address)
    load_pipeline(file, settings=settings or ())
    result = jobs.submit(file, address=address, settings=settings or (), follow=follow, echo=typer.echo)
    raise typer.Exit(result.exit_code)


@app.command()
def sync(storage: Storage = DEFAULT_STORE) -> None:
    """Send what was spooled while the tracking server was away."""
    from heliostat.report.runs import check_store
    from heliostat.tracking.replay import replay

    check_store(storage)
    replayed = replay(storage / "spool")
    typer.echo(f"{replayed.delivered} events delivered, {replayed.waiting} still waiting")
    for reason in replayed.reasons:
        typer.echo(reason, err=True)
    raise typer.Exit(1 if replayed.waiting else 0)


@app.command()
def doctor(
    storage: Annotated[str, typer.Option(metavar="S", help="The store: a folder, or s3://…")] = str(DEFAULT_STORE),
    tracking_uri: Annotated[str | None, typer.Option(metavar="URI", help="The MLflow server to look for.")] = None,
    address: Annotated[str | None, typer.Option(metavar="A", help="The running Ray to look for.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this machine, and what to type."""
    from dataclasses import asdict

    from heliostat.report.text import table_of
    from heliostat.runtime.health import diagnose

    findings = diagnose(storage, tracking_uri, address)
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        rows = [(f.ok, f.name, f.text, f.fix or "") for f in findings]
        _console().print(table_of(("", "what", "found", "to do"), rows))
    raise typer.Exit(1 if any(finding.ok == "problem" for finding in findings) else 0)


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)]) -> None:
    """Make a new project that runs as it is: a model, its data and a pipeline, to be changed into yours."""
    from heliostat.templates import create_project

    for path in create_project(folder):
        typer.echo(f"wrote {path}")
    typer.echo(f"next: {command('run', str(folder / 'pipeline.yaml'))}")


@cluster_app.command()
def validate(file: ClusterFile) -> None:
    """Check a cluster file against Ray's own schema. Needs no cloud account."""
    from heliostat.runtime.cluster_files import validate as check

    summary = check(file)
    workers = f"{summary.min_workers} to {summary.max_workers} workers"
    typer.echo(f"{file}: valid {summary.kind} file for {summary.provider}, {workers}")
    for warning in summary.warnings:
        typer.echo(f"warning: {warning}")


@cluster_app.command()
def up(file: ClusterFile) -> None:
    """Bring the cluster up."""
    from heliostat.runtime import cluster_files

    raise typer.Exit(cluster_files.up(file))


@cluster_app.command()
def down(file: ClusterFile) -> None:
    """Take the cluster down."""
    from heliostat.runtime import cluster_files

    raise typer.Exit(cluster_files.down(file))


@cluster_app.command()
def status(file: ClusterFile) -> None:
    """Show the cluster's nodes and what they hold."""
    from heliostat.runtime import cluster_files

    raise typer.Exit(cluster_files.status(file))


def main() -> None:
    """The `heliostat` command. Exit codes: 0 done, 1 failed, 2 file or flag wrong, 3 can never fit, 130 interrupted."""
    try:
        keep_passwords_out_of_sight()
        app()
    except HeliostatError as error:
        sys.stderr.write(f"error: {redacted(str(error))}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        if (full := disk_error(error, Path.cwd())) is None:
            raise
        sys.stderr.write(f"error: {with_advice(full)}\n")
        sys.exit(full.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing that was finished is lost; the same command resumes\n")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
