"""Checkpoints of a run, kept by Orbax: written asynchronously and atomically, the newest and the best kept."""

import errno
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from vpo_jax.runtime.buckets import in_bucket
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.processes import agree, main_first
from vpo_jax.runtime.trees import bytes_of

_LOG = logging.getLogger(__name__)

# What Orbax and tensorstore raise for files that are missing, cut short or changed.
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError)


class CheckpointStore:
    """Checkpoints under one directory, named by step.

    Keeps the `keep` newest, and the one with the highest metric whatever its age.
    """

    def __init__(self, directory: str | Path, keep: int = 2, read_only: bool = False) -> None:
        self.directory = Path(directory).resolve()
        self.broken: list[int] = []
        if read_only and not self.directory.is_dir():
            raise UserError(f"{directory}: there are no checkpoints; give the workdir of a run that has saved one")
        # Renaming a folder makes a checkpoint whole at once, but not in a bucket: there a file in it says so.
        mode = AtomicityMode.COMMIT_FILE if in_bucket(self.directory) else AtomicityMode.AUTO
        policies = [LatestN(keep), BestN(get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=_metric,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
            atomicity_options=AtomicityOptions(mode),
        )
        with _explained(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: Any, meta: Mapping[str, Any], metric: float | None = None) -> None:
        """Starts writing `state` (a pytree of arrays) and `meta` (JSON) as the checkpoint of `step`.

        Returns once the arrays may be overwritten; the files follow in the background. A step that is there
        already is left as it is. Raises UserError when the disk is full, here or at the next call.
        """
        if step in self.all_steps():
            return
        self._require_space(bytes_of(jax.eval_shape(lambda: state)))
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta)))
        with _explained(self.directory, state):
            saved = self._manager.save(step, args=items, metrics=None if metric is None else {"metric": float(metric)})
        if not saved:
            # Orbax refuses without a word: a newer checkpoint than this step is there.
            raise RuntimeError(f"checkpoint {step} was not saved: the newest is {self.latest()}")

    def restore(self, step: int | None, target: Any) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, meta) of a step, or of the newest that is whole when `step` is None.

        `target` is the state's tree of `jax.ShapeDtypeStruct` with shardings, of any mesh. A broken newest
        checkpoint is set aside under "<directory>.broken" with a warning, and the one before it is taken.
        Raises UserError when there is none.
        """
        candidates = self._candidates(step)
        restored = next(self._whole(candidates, target), None)
        if restored is None:
            raise UserError(
                f"{self.directory}: no checkpoint of steps {', '.join(map(str, candidates))} can be read"
                f" ({self._reason}); take another --workdir, or put the files back"
            )
        for broken in candidates[: candidates.index(restored[0])]:
            _LOG.warning("checkpoint %d is broken; going on from step %d", broken, restored[0])
            self._set_aside(broken)
        return restored

    def read(self, step: int | None = None, parts: Sequence[str] = ()) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, meta) without a target: dicts of arrays on one device, only the named top-level `parts`."""
        step = self._candidates(step)[0]
        with _explained(self.directory, step=step), ocp.PyTreeCheckpointer() as files:
            tree = files.metadata(self.directory / str(step) / "state").item_metadata.tree
            missing = [part for part in parts if part not in tree]
            if missing:
                there = ", ".join(tree)
                raise UserError(f"{self.directory}: checkpoint {step} has no {missing[0]!r}; it holds {there}")
            sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                {part: tree[part] for part in parts or tree},
            )
            arguments = ocp.args.PyTreeRestore(
                item=target,
                restore_args=jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=sharding), target),
                partial_restore=True,
            )
            state = files.restore(self.directory / str(step) / "state", args=arguments)
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return step, state, meta

    def latest(self) -> int | None:
        """The newest step, whole or not; None where there is no checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest metric, or None where no checkpoint has one."""
        return self._manager.best_step()

    def all_steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns once every save is on the disk; raises UserError when one did not fit."""
        with _explained(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the directory."""
        with _explained(self.directory):
            self._manager.close()

    def _candidates(self, step: int | None) -> list[int]:
        steps = self.all_steps()
        if step is not None and step not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            raise UserError(f"{self.directory}: no checkpoint of step {step}; {there}")
        if not steps:
            raise UserError(f"{self.directory}: there are no checkpoints; give the workdir of a run that has saved one")
        return steps[::-1] if step is None else [step]

    def _whole(self, steps: Sequence[int], target: Any) -> Iterator[tuple[int, Any, dict[str, Any]]]:
        self._reason = ""
        for step in steps:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
            try:
                restored = self._manager.restore(step, args=items)
                broken = False
            except _BROKEN as error:
                self._reason = self._reason or str(error).strip().partition("\n")[0]
                broken = True
            if agree(broken):  # another process may have met the broken file
                self._reason = self._reason or "a shard of another process"
                continue
            yield step, restored["state"], restored["meta"]

    def _set_aside(self, step: int) -> None:
        aside = self.directory.with_name(self.directory.name + ".broken")

        def move() -> None:
            with _explained(aside):
                aside.mkdir(exist_ok=True)
                shutil.rmtree(aside / str(step), ignore_errors=True)
                shutil.move(self.directory / str(step), aside / str(step))

        main_first(move)
        self._manager.reload()
        self.broken.append(step)

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(_no_space(self.directory, needed, free))


def _metric(metrics: Mapping[str, float]) -> float:
    return metrics["metric"]


def _no_space(directory: Path, needed: int, free: int) -> str:
    need = f"{needed / 2**20:.1f} MB" if needed else "more"
    return (
        f"{directory}: the disk is full ({free / 2**20:.1f} MB free, a checkpoint needs {need});"
        f" free some space or lower checkpoint.keep, and the same command continues from the last whole checkpoint"
    )


class _explained:  # noqa: N801 - used as a statement, like contextlib's own
    """Turns a full disk, missing permission or broken file into a UserError that names the directory."""

    def __init__(self, directory: Path, state: Any = None, step: int | None = None) -> None:
        self.directory, self.state, self.step = directory, state, step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, UserError):
            return
        if _is_no_space(error):
            needed = bytes_of(jax.eval_shape(lambda: self.state)) if self.state is not None else 0
            raise UserError(_no_space(self.directory, needed, shutil.disk_usage(self.directory).free)) from error
        if isinstance(error, PermissionError):
            raise UserError(f"{self.directory}: no permission to write; choose another --workdir") from error
        if self.step is not None and isinstance(error, _BROKEN):
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{self.directory}: checkpoint {self.step} cannot be read ({reason}); choose another --step"
            ) from error


def _is_no_space(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search(r"No space left|ENOSPC|[Dd]isk quota exceeded", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
