"""A demo, run once for every test that looks at it."""

import pytest

SMALL = ("--players", "3000", "--days", "40")  # as many as the gate needs


@pytest.fixture(scope="session")
def small():
    """Arguments of a demo that is small, and yet large enough for the gate."""
    return SMALL


@pytest.fixture(scope="session")
def demo(as_a_user, tmp_path_factory):
    """A small demo, from the first to the last step, traced: its workspace and its run."""
    base = tmp_path_factory.mktemp("demo")
    run = as_a_user("demo", "shop", "--json", *SMALL, cwd=base, traced=True).wait(1_200)
    return base / "shop", run
