"""The API reference: docs/build.py shows every public name, and refuses what it cannot show."""

import html
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from pages import ROOT, code_of

import fastelbo
from docs import build


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    build.build(out)
    return out


@pytest.mark.parametrize("name", fastelbo.__all__)
def test_every_public_name_is_in_the_reference(site: Path, name: str) -> None:
    if isinstance(getattr(fastelbo, name), types.ModuleType):
        assert (site / "fastelbo" / f"{name}.html").exists()
    else:
        assert f'<section id="{name}">' in (site / "fastelbo.html").read_text()


def test_links_between_the_pages_lead_somewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for target, anchor in re.findall(r'<a href="(?!https?:)([^":#]*)#?([^"]*)"', page.read_text()):
            other = (page.parent / target) if target else page
            assert other.exists(), f"{page.name} links to {target}"
            assert not anchor or f'id="{anchor}"' in other.read_text(), f"{page.name} links to {target}#{anchor}"


def test_docstrings_keep_their_characters(site: Path) -> None:
    assert "[B, *event] or [K, B, *event]" in (site / "fastelbo.html").read_text()


class Undocumented:
    """A class."""

    def method(self) -> None: ...


def test_a_public_name_without_a_docstring_is_refused() -> None:
    module = types.ModuleType("module", "A module.")
    module.Undocumented, module.__all__ = Undocumented, ["Undocumented"]
    with pytest.raises(ValueError, match=r"need a docstring: .*Undocumented\.method"):
        build.page(module)


def test_the_recipes_are_a_page(site: Path) -> None:
    page = (site / "recipes.html").read_text()
    for recipe in (ROOT / "examples/recipes").glob("*.py"):
        assert f'id="{recipe.stem}"' in page, recipe.stem


def test_the_index_says_what_this_is(site: Path) -> None:
    """It is README.md, with every page among its links, and the pictures in it."""
    index = (site / "index.html").read_text()
    assert "Fused losses for variational autoencoders" in index and "<title>README" in index
    for page in (*build.PROSE, "command", "recipes"):
        assert f'<li><a href="{page}.html">' in index, page
    assert '<a href="limits.html">' in index and '<a href="CONTRIBUTING' not in index
    assert '<a href="recipes.html#vampprior">' in (site / "models.html").read_text()
    for page in site.glob("*.html"):
        assert not re.findall(r'<img[^>]*src="(?!data:)', page.read_text()), page


def test_every_page_is_among_them() -> None:
    assert {path.stem for path in build.HERE.glob("*.md")} == {*build.PROSE} - {"README"}


def test_the_page_of_the_command_has_its_options(site: Path) -> None:
    page = html.unescape((site / "command.html").read_text())
    for heading, option in (("train", "--free-bits"), ("evaluate", "--chunk-size"), ("sample", "--mean")):
        assert f'id="fastelbo-{heading}"' in page and option in page


# ----------------------------------------------------------------------------------------------------------------------
# The code of README.md and of the pages. That of docs/adapters.md and docs/counts.md, which need other packages, is run
# by tests/integrations/test_adapters_page.py.


def page_code(name: str) -> list[str]:
    return code_of(build.source(name).read_text())


def test_the_script_runs_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(page_code("functions")[0])
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    elbo, log_p = map(float, re.findall(r"-\d+\.\d+", done.stdout))
    assert -30 < elbo < log_p + 0.2 and log_p < -20


def test_the_lines_of_the_readme_give_the_same_loss() -> None:
    x, decoder = torch.rand(40, 6), torch.nn.Linear(2, 6)
    mu, logvar = torch.randn(40, 2), torch.randn(40, 2)
    space = {"torch": torch, "F": torch.nn.functional, "fastelbo": fastelbo, "x": x, "mu": mu, "logvar": logvar}
    space["logits"] = decoder(mu)
    (code,) = page_code("README")
    before, after = code.split("# after")
    exec(before, space)
    plain = space.pop("loss")
    exec(f"#{after}", space)
    torch.testing.assert_close(space["loss"], plain)


def run_page(name: str) -> dict[str, object]:
    """What the code of a page leaves behind."""
    space: dict[str, object] = {"__name__": "page"}
    for block in page_code(name):
        exec(block, space)
    return space


def test_the_code_of_the_page_on_functions_runs() -> None:
    space = run_page("functions")
    assert space["log_likelihood"].shape == space["kl"].shape == (297,) and space["posterior"].z.shape == (50, 297, 8)


def test_the_code_of_the_page_on_models_runs() -> None:
    space = run_page("models")
    assert space["recon"].shape == (50, 16, 784) and space["estimate"].log_prob.shape == (16,)
    assert space["objective"].num_samples == 50 and space["drawn"].shape == (4, 784)
    assert all(p.grad.abs().max() > 0 for p in space["model"].parameters())


def test_the_code_of_the_page_on_pca_runs() -> None:
    space = run_page("ppca")
    x, full, seen = space["x"], space["full"], ~space["gaps"].isnan()
    assert space["z"].shape == (200, 16) and torch.equal(full[seen], x[seen]) and full.isfinite().all()


def test_the_code_of_the_concepts_page_runs() -> None:
    space = run_page("concepts")
    assert tuple(space["estimate"].log_prob.shape) == (8,) and space["total"].count == 100
    assert space["prior_mu"].grad.shape == (20,) and space["logvar_x"].grad.shape == ()
    assert space["model"].prior.mu.grad.shape == (20,) and space["bits"].shape == (8,)
    assert space["mixture"].prior.mu.grad.abs().max() > 0 and space["drawn"].shape == (4, 784)


def test_the_code_of_the_page_on_practice_runs() -> None:
    space = run_page("practice")
    assert space["posterior"].z.shape == (8, 20)


def test_the_code_of_the_page_on_kept_samples_runs() -> None:
    space = run_page("kept_samples")
    assert space["log_w"].shape == (50, 16) and space["kept"].sample.shape == (8 * 16,)
    assert all(p.grad.abs().max() > 0 for p in (*space["encoder"].parameters(), *space["conditional"].parameters()))
    log_w, loss = space["log_w"], space["loss"]  # of "vr", alpha = 0.5
    torch.testing.assert_close(loss, -2 * fastelbo.log_mean_exp(0.5 * log_w).mean())
