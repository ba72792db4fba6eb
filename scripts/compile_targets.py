"""Devices to compile for that need not be there: TPU slices, an H100, some CPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

TARGETS = "v5e:2x2, v6e:2x2 (or another slice of these), h100, cpu:N"


def devices_of(target: str) -> list[Any]:
    """Return the devices of a target; SystemExit where its compiler is not installed.

    To be called before JAX has been asked for any device.
    """
    kind, _, size = target.partition(":")
    try:
        if kind == "cpu" and size.isdecimal():
            jax.config.update("jax_num_cpu_devices", int(size))
            return jax.devices("cpu")
        if kind in ("v5e", "v6e") and size:
            return _tpu(target)
        if target == "h100":
            return _h100()
    except (RuntimeError, ImportError) as error:
        raise SystemExit(f"{target}: its compiler is not at hand: {error}") from error
    raise SystemExit(f"--target {target}: expected one of {TARGETS}")


def _tpu(topology: str) -> list[Any]:
    # libtpu asks the cloud for what is known here, and waits for an answer.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def _h100() -> list[Any]:
    described = Path(__file__).with_name("h100.txtpb").read_text()
    description = topologies.get_topology_desc(
        platform="cuda", target_config=described, topology="1x1x1"
    )
    return list(description.devices)
