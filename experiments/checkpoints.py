"""Checkpoints of a training run, kept with orbax."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from training import Point, Run


class Checkpoints:
    """The newest checkpoint of one method, in a folder of its own."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """Opens the folder.

        Args:
            folder: where to keep the checkpoint.
            config: the settings that a run must share to continue it.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._config = config

    def save(self, run: Run) -> None:
        """Writes params, state, counters and curve; returns when they are on disk."""
        if self._manager.latest_step() == run.iteration:
            return
        counters = {
            "config": self._config,
            "seconds": run.seconds,
            "compile_seconds": run.compile_seconds,
            "curve": [asdict(point) for point in run.curve],
        }
        arrays = {"params": run.params, "state": run.state}
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), counters=ocp.args.JsonSave(counters)
        )
        self._manager.save(run.iteration, args=items)
        self._manager.wait_until_finished()

    def restore(self, run: Run) -> Run:
        """The saved run, or `run` itself where nothing is saved.

        Raises:
            ValueError: the checkpoint comes from a run with other settings.
        """
        step = self._manager.latest_step()
        if step is None:
            return run
        arrays = {"params": run.params, "state": run.state}
        items = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(arrays), counters=ocp.args.JsonRestore()
        )
        saved = self._manager.restore(step, args=items)
        counters = saved["counters"]
        self._check(counters["config"])
        print(f"Resuming after {step} iterations, {counters['seconds']:.1f} s.")
        return Run(
            **saved["arrays"],
            iteration=step,
            seconds=counters["seconds"],
            compile_seconds=counters["compile_seconds"],
            curve=[Point(**point) for point in counters["curve"]],
        )

    def _check(self, saved: dict[str, Any]) -> None:
        names = sorted(saved.keys() | self._config.keys())
        differing = [
            f"{name} (saved: {saved.get(name)}, now: {self._config.get(name)})"
            for name in names
            if saved.get(name) != self._config.get(name)
        ]
        if differing:
            raise ValueError(
                f"The checkpoint in {self._folder} has other settings: "
                f"{', '.join(differing)}. Use the same ones, or start without resuming."
            )

    def clear(self, run: Run) -> Run:
        """Deletes what an earlier run left; returns the new run as it is."""
        if self._manager.all_steps():
            print(f"Starting anew: deleting the earlier checkpoint in {self._folder}.")
        for step in self._manager.all_steps():
            self._manager.delete(step)
        return run

    def __enter__(self) -> Checkpoints:
        """Nothing to do: the constructor opened the folder."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the threads that write."""
        self._manager.close()
