"""A stage is inert data and one function; who brings an own one names it by import path or as an entry point."""

import importlib
import sys

import pytest

from heliostat.core.load import load_pipeline
from heliostat.core.model import Spec
from heliostat.core.stage import Slot, StageContext, StageResult, find_kind, stage
from heliostat.errors import SpecError
from heliostat.runner import plan

OWN = """
from heliostat.core.model import Count, Spec
from heliostat.core.stage import StageContext, StageResult, stage


class CropConfig(Spec):
    layers: Count = 1


def check(config, view):
    if config.layers > 9:
        yield "config.layers: the model has only 9"


@stage("crop", inputs={"model": "model"}, output="model", version=3, check=check)
def crop(context: StageContext, config: CropConfig) -> StageResult:
    return StageResult(files=[])
"""


@pytest.fixture
def own(toy):
    """The toy pipeline with one more stage, whose kind is in `own.py` beside it."""
    (toy.folder / "own.py").write_text(OWN)

    def plan_with(uses: str, **config: object):
        document = toy.document
        more = {"name": "crop", "uses": uses, "inputs": {"model": ["train", "prune"]}, "config": config}
        document["stages"].append(more)
        return plan(load_pipeline(toy.write(document)))

    return plan_with


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a package look installed, with entry points in the group `heliostat.stages`."""

    def put(**points: str) -> None:
        info = tmp_path / "site" / "own_stages-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-stages\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[heliostat.stages]\n{lines}")
        monkeypatch.syspath_prepend(info.parent)

    return put


def test_an_own_stage_is_used_by_its_import_path(own):
    nodes = [node for node in own("own:crop", layers=2).nodes if node.stage == "crop"]
    assert [node.name for node in nodes] == [
        "crop[train]",
        "crop[prune[sparsity=0.25]]",
        "crop[prune[sparsity=0.5]]",
    ]
    assert nodes[0].config.layers == 2
    assert (nodes[0].identity["kind"], nodes[0].identity["version"]) == ("crop", 3)


def test_an_own_stages_config_is_checked_like_any_other(own):
    with pytest.raises(SpecError, match=r"stages\[6\] \(crop\)\.config\.layrs: unknown field; did you mean 'layers'"):
        own("own:crop", layrs=2)
    with pytest.raises(SpecError, match=r"stages\[6\] \(crop\)\.config\.layers: the model has only 9"):
        own("own:crop", layers=10)


def test_the_source_of_an_own_stage_is_part_of_what_it_makes_and_of_nothing_else(toy, own):
    before = {node.name: node.fingerprint for node in own("own:crop").nodes}
    (toy.folder / "own.py").write_text(OWN + "# more\n")
    after = {node.name: node.fingerprint for node in own("own:crop").nodes}
    assert {name for name in after if after[name] != before[name]} == {
        "crop[train]",
        "crop[prune[sparsity=0.25]]",
        "crop[prune[sparsity=0.5]]",
    }


def test_an_own_stage_is_used_by_its_entry_point(own, install):
    install(crop="own:crop")
    assert own("crop").node("crop[train]").kind.reference == "own:crop"


def test_an_entry_point_is_among_the_words_that_are_suggested(own, install):
    install(crop="own:crop")
    with pytest.raises(SpecError, match="unknown stage kind 'crp'; did you mean 'crop'"):
        own("crp")


def test_an_entry_point_that_does_not_load_is_refused_with_the_reason(own, install):
    install(crop="own:cropp")
    with pytest.raises(SpecError, match=r"stages\[6\] \(crop\)\.uses: 'own' has no 'cropp'; did you mean 'crop'"):
        own("crop")


def test_an_entry_point_may_not_shadow_a_built_in(own, install):
    install(prune="own:crop")
    with pytest.raises(SpecError, match="'own:crop' may not shadow the built-in stage 'prune'"):
        own("own:crop")


def test_nor_may_a_stage_call_itself_like_one(toy, own):
    (toy.folder / "own.py").write_text(OWN.replace('@stage("crop"', '@stage("prune"'))
    with pytest.raises(SpecError, match="'own:crop' calls itself 'prune', but may not shadow the built-in"):
        own("own:crop")
    assert find_kind("prune").reference == "heliostat.stages.prune:prune"


def test_declaring_a_stage_does_nothing_but_describe_it(toy):
    (toy.folder / "own.py").write_text(OWN)
    sys.path.insert(0, str(toy.folder))
    crop = importlib.import_module("own").crop
    kind = crop.__stage_kind__
    assert (kind.name, kind.output, kind.place, kind.inputs) == ("crop", "model", "task", {"model": Slot("model")})
    with pytest.raises(SpecError, match="unknown stage kind 'crop'"):
        find_kind("crop")


def test_a_stage_says_what_its_config_is():
    def nameless(context: StageContext, config: dict) -> StageResult: ...

    with pytest.raises(SpecError, match="annotate the argument `config` of nameless with a subclass of Spec"):
        stage("nameless", output="model")(nameless)


def test_a_stage_must_be_found_again_by_name():
    class Config(Spec):
        pass

    def inner(context, config) -> StageResult: ...

    inner.__annotations__["config"] = Config
    with pytest.raises(SpecError, match="define it at the top level of a module"):
        stage("inner", output="model")(inner)


@pytest.mark.parametrize(
    ("text", "slot"),
    [
        ("model", Slot("model")),
        ("params?", Slot("params", optional=True)),
        ("model*", Slot("model", many=True)),
        ("params*?", Slot("params", optional=True, many=True)),
    ],
)
def test_a_slot_is_written_as_its_kind_and_how_many(text, slot):
    assert Slot.parse(text) == slot
