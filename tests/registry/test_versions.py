"""Which versions of nnj a distribution asks for."""

import pytest

from nnj.registry.claim import DISABLED
from nnj.registry.versions import fits, required
from tests.support.distributions import CLAIM, Fakes, load, refusal


@pytest.mark.parametrize(
    "lines, clauses",
    [
        ([], ""),
        (["nnj"], ""),
        (["torch>=2", "nnj-siren>=3", "nnjx<1", "nnj>=1,<2"], ">=1,<2"),
        (["nnj (>=1.0, <2)"], ">=1.0,<2"),
        (["NNJ[examples] ~= 1.2"], "~=1.2"),
        (["nnj>=1", "nnj!=1.3"], ">=1,!=1.3"),
        (["nnj>=9; extra == 'test'", "nnj @ https://example.org/nnj.whl"], ""),
    ],
)
def test_required(lines, clauses):
    assert required(lines) == clauses


@pytest.mark.parametrize(
    "version, clauses, expected",
    [
        ("1.0.0", "", True),
        ("1.0.0", ">=1,<2", True),
        ("2.0", ">=1,<2", False),
        ("0.9", ">=1,<2", False),
        ("1.0.0", "==1", True),
        ("1.0.1", "==1", False),
        ("1.4", "==1.*", True),
        ("2.4", "==1.*", False),
        ("1.4", "!=1.*", False),
        ("1.4", "!=1.4", False),
        ("1.10", ">1.9", True),
        ("1.9", ">1.9", False),
        ("1.9", "<=1.9.0", True),
        ("1.3", "~=1.2", True),
        ("1.1", "~=1.2", False),
        ("2.2", "~=1.2", False),
        ("1.2.9", "~=1.2.3", True),
        ("1.3.0", "~=1.2.3", False),
        ("1.0.0rc1", ">=2", True),
        ("1.0", ">=2.0rc1", True),
    ],
)
def test_fits(version, clauses, expected):
    assert fits(version, clauses) is expected


def ask(fakes: Fakes, requirement: str) -> None:
    fakes.claim("nnj-squash", version="0.3")
    (metadata,) = fakes.path.glob("nnj_squash-*/METADATA")
    metadata.write_text(f"{metadata.read_text()}Requires-Dist: {requirement}\n")


def test_a_plugin_for_another_version(fakes, monkeypatch):
    ask(fakes, "nnj<2,>=1")
    assert load()
    monkeypatch.setattr("nnj.registry.discovery.__version__", "2.1.0")
    assert refusal() == (
        "plugin 'nnj-squash' (nnj-squash 0.3) was written for another version: it asks for "
        "nnj<2,>=1, and this is nnj 2.1.0. Install a nnj-squash that goes with it, or disable the "
        "plugin with NNJ_DISABLED_PLUGINS=nnj-squash"
    )
    monkeypatch.setenv(DISABLED, "nnj-squash")
    assert load().disabled == ["nnj-squash"]


def test_it_is_not_imported(fakes):
    fakes.install(
        "nnj-squash", "raise RuntimeError('imported')\n" + CLAIM.format(cls="int", more="")
    )
    (metadata,) = fakes.path.glob("nnj_squash-*/METADATA")
    metadata.write_text(f"{metadata.read_text()}Requires-Dist: nnj>=1000\n")
    assert "was written for another version: it asks for nnj>=1000" in refusal()
