"""Clusters of others: commands join them by address, or say in one line why they cannot."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.bench.cells import Command, sparsebench, write_suite


def run_at(address: str, folder: Path, **environment: str) -> str:
    """What a command says that cannot join the cluster at an address."""
    suite = write_suite(folder)
    run = ("run", suite, "--executor", "ray", "--address", address)
    command = sparsebench(*run, cwd=folder, **environment)
    said, errors = command.communicate()
    assert command.returncode == 2, said + errors
    assert not (folder / "records" / "tiny" / "locks").exists()
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def test_an_address_where_nobody_answers_is_one_line(tmp_path):
    pytest.importorskip("ray", reason="not run: no ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = run_at(address, tmp_path)
    assert line.startswith(f"sparsebench: --address {address}: no Ray cluster can be used (")
    assert "refused" in line


def test_a_token_that_is_missing_is_one_line(tmp_path):
    pytest.importorskip("ray", reason="not run: no ray")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        line = run_at(address, tmp_path, RAY_AUTH_MODE="token", HOME=str(tmp_path))
    assert "no authentication token was found" in line


@pytest.mark.faults
def test_a_command_without_the_token_of_a_cluster_is_told_how_to_show_it(cluster, tmp_path):
    line = run_at(cluster, tmp_path, RAY_AUTH_MODE="")
    assert line.endswith("If it asks for a token, set RAY_AUTH_MODE=token.")
    run = ("run", tmp_path / "tiny.toml", "--records", tmp_path / "records")
    where = ("--executor", "ray", "--address", cluster)
    command = Command(*run, *where, output=tmp_path / "said")  # Ray has set it here
    assert command.wait() == 0, command.said
