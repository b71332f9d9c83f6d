import errno
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vpo_jax.checkpoints import orbax_store
from vpo_jax.checkpoints.orbax_store import CheckpointStore
from vpo_jax.runtime import buckets
from vpo_jax.runtime.errors import UserError


def make_state(value: float = 1.0):
    policy = {"down_blocks.0": {"kernel": jnp.full((3, 4), value)}, "scale": jnp.zeros(2, jnp.bfloat16)}
    return {
        "policy": policy,
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(policy),
        "key": jax.random.key(3),
        "step": jnp.int32(4),
        "ema": None,
    }


def target_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_steps(directory: Path, steps, keep=2):
    store = CheckpointStore(directory, keep=keep)
    for step in steps:
        store.save(step, make_state(step), {"position": step})
    store.wait()
    return store


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB that is really full when it is full."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_everything_comes_back_bitwise_and_with_its_own_types(tmp_path):
    state = make_state(0.1)
    with_key = CheckpointStore(tmp_path)
    with_key.save(7, state, {"epoch": 1, "prompts": ["a <b>", "\u00e9"]})
    step, restored, meta = with_key.restore(None, target_of(state))
    assert step == 7 and meta == {"epoch": 1, "prompts": ["a <b>", "\u00e9"]}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert new.dtype == old.dtype
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            new, old = jax.random.key_data(new), jax.random.key_data(old)
        np.testing.assert_array_equal(new, old)


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step, metric in enumerate([0.1, 0.5, 0.2, None, 0.3, None]):
        store.save(step, make_state(step), {}, metric)
    store.wait()
    assert store.all_steps() == [1, 4, 5] and store.best() == 1 and store.latest() == 5


def test_a_saved_state_is_the_one_at_the_call_though_its_buffers_are_donated_next(tmp_path):
    store = CheckpointStore(tmp_path)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    for step in range(3):
        big = jnp.full((1_000_000,), float(step))
        store.save(step, {"big": big}, {})
        big = overwrite(big)
        jax.block_until_ready(big)
    target = {"big": jax.ShapeDtypeStruct((1_000_000,), jnp.float32, sharding=big.sharding)}
    for step in store.all_steps():
        assert (store.restore(step, target)[1]["big"] == step).all()


def test_saving_a_step_twice_keeps_the_first_and_an_older_one_is_refused_aloud(tmp_path):
    store = save_steps(tmp_path, [5])
    store.save(5, make_state(9.0), {"position": 9})
    store.wait()
    assert store.restore(5, target_of(make_state()))[2] == {"position": 5}
    with pytest.raises(RuntimeError, match="newest is 5"):
        store.save(4, make_state(), {})


def truncate(directory: Path):
    for path in (directory / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_arrays(directory: Path):
    shutil.rmtree(directory / "state" / "ocdbt.process_0")
    shutil.rmtree(directory / "state" / "d")


def empty_metadata(directory: Path):
    (directory / "state" / "_METADATA").write_text("")


def remove_meta(directory: Path):
    shutil.rmtree(directory / "meta")


def zero_bytes(directory: Path):
    for path in (directory / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [truncate, remove_arrays, empty_metadata, remove_meta, zero_bytes])
def test_a_broken_newest_checkpoint_gives_the_one_before_and_the_step_can_be_saved_again(tmp_path, damage, caplog):
    directory = tmp_path / "checkpoints"
    save_steps(directory, [1, 2]).close()
    damage(directory / "2")
    store = CheckpointStore(directory)
    step, state, meta = store.restore(None, target_of(make_state()))
    assert step == 1 and meta == {"position": 1} and (state["policy"]["down_blocks.0"]["kernel"] == 1).all()
    assert store.broken == [2] and "checkpoint 2 is broken" in caplog.text
    assert (tmp_path / "checkpoints.broken" / "2").is_dir()
    store.save(2, make_state(2), {"position": 2})
    store.wait()
    assert store.restore(None, target_of(make_state()))[0] == 2


def test_with_every_checkpoint_broken_nothing_is_moved_and_the_error_names_the_directory(tmp_path):
    directory = tmp_path / "checkpoints"
    save_steps(directory, [1, 2]).close()
    for step in (1, 2):
        remove_arrays(directory / str(step))
    with pytest.raises(UserError, match="no checkpoint of steps 2, 1 can be read"):
        CheckpointStore(directory).restore(None, target_of(make_state()))
    assert sorted(p.name for p in directory.iterdir()) == ["1", "2"]


def test_leftovers_of_a_killed_save_are_ignored_and_replaced(tmp_path):
    save_steps(tmp_path, [1]).close()
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    store = CheckpointStore(tmp_path)
    assert store.all_steps() == [1]
    store.save(2, make_state(), {})
    store.wait()
    assert store.all_steps() == [1, 2]


def test_parts_are_read_without_knowing_the_state(tmp_path):
    save_steps(tmp_path, [3]).close()
    store = CheckpointStore(tmp_path, read_only=True)
    step, state, meta = store.read(parts=["policy"])
    assert (step, meta, list(state)) == (3, {"position": 3}, ["policy"])
    assert (state["policy"]["down_blocks.0"]["kernel"] == 3).all()
    with pytest.raises(UserError, match="checkpoint 3 has no 'emma'"):
        store.read(parts=["emma"])
    with pytest.raises(UserError, match="no checkpoint of step 4; there are 3"):
        store.read(4)


def test_a_directory_without_checkpoints_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="there are no checkpoints"):
        CheckpointStore(tmp_path / "none", read_only=True)
    with pytest.raises(UserError, match="there are no checkpoints"):
        CheckpointStore(tmp_path).restore(None, {})


def noise(seed: int, megabytes: float):
    return {"x": jax.random.normal(jax.random.key(seed), (int(megabytes * 2**18),))}


def test_a_full_disk_is_told_before_the_save_with_the_room_that_is_needed(small_disk):
    store = CheckpointStore(small_disk / "checkpoints")
    with pytest.raises(UserError, match=r"disk is full \(2\.0 MB free, a checkpoint needs 3\.0 MB\)"):
        store.save(1, noise(1, 3), {})


def test_a_disk_that_fills_in_mid_save_is_told_and_the_checkpoint_before_is_whole(small_disk, monkeypatch):
    # The disk looks roomy when the save starts, as it does when another program fills it meanwhile.
    monkeypatch.setattr(orbax_store.CheckpointStore, "_require_space", lambda self, needed: None)
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, noise(1, 1.2), {})
    store.wait()
    with pytest.raises(UserError, match="disk is full"):
        store.save(2, noise(2, 1.2), {})
        store.wait()
    again = CheckpointStore(small_disk / "checkpoints")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), noise(1, 1.2))
    step, state, _ = again.restore(None, target)
    assert step == 1
    np.testing.assert_array_equal(state["x"], noise(1, 1.2)["x"])


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that passes for gcsfuse's mount of a bucket without folders: none of its folders can be renamed."""
    folder, table, rename = tmp_path / "bucket", tmp_path / "mounts", os.rename
    folder.mkdir()
    table.write_text(f"mine {folder} fuse.gcsfuse rw 0 0\n")
    monkeypatch.setattr(buckets, "_MOUNTS", table)

    def files_only(source, target, **places):
        if Path(source).is_dir() and Path(source).is_relative_to(folder):
            raise OSError(errno.EMFILE, "Too many open files", str(source))
        rename(source, target, **places)

    monkeypatch.setattr(os, "rename", files_only)
    return folder


def test_a_bucket_s_checkpoints_need_no_folder_renamed(bucket):
    store = save_steps(bucket, [1, 2, 3])
    assert store.all_steps() == [2, 3] and (bucket / "3" / "commit_success.txt").is_file()
    store.close()
    (bucket / "3" / "commit_success.txt").unlink()  # as a kill leaves it
    again = CheckpointStore(bucket)
    assert again.all_steps() == [2]
    step, state, meta = again.restore(None, target_of(make_state()))
    assert step == 2 and meta == {"position": 2}
    np.testing.assert_array_equal(state["policy"]["down_blocks.0"]["kernel"], np.full((3, 4), 2.0))
    again.save(3, make_state(3), {"position": 3})
    again.close()
    assert CheckpointStore(bucket, read_only=True).read(3, ["policy"])[2] == {"position": 3}


def test_a_bucket_s_broken_checkpoint_is_set_aside_by_copying(bucket):
    save_steps(bucket / "checkpoints", [1, 2]).close()
    for file in (bucket / "checkpoints" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    store = CheckpointStore(bucket / "checkpoints")
    assert store.restore(None, target_of(make_state()))[0] == 1 and store.broken == [2]
    assert (bucket / "checkpoints.broken" / "2" / "state").is_dir() and store.all_steps() == [1]


def test_checkpoints_that_a_disk_made_go_on_in_a_bucket(bucket, tmp_path):
    save_steps(tmp_path / "disk", [1, 2]).close()
    shutil.copytree(tmp_path / "disk", bucket / "checkpoints")
    store = CheckpointStore(bucket / "checkpoints")
    assert store.all_steps() == [1, 2] and store.restore(None, target_of(make_state()))[0] == 2
    store.save(3, make_state(3), {"position": 3})
    store.close()
    # And back on a disk.
    shutil.copytree(bucket / "checkpoints", tmp_path / "back")
    assert CheckpointStore(tmp_path / "back").restore(None, target_of(make_state()))[0] == 3
