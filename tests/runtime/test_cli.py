import pytest

from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.signals import Interrupted


@pytest.fixture
def config():
    return cli.load_config("configs/vpo.py")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "7", 7),
        ("preference.beta", "1e3", 1000.0),
        ("optimizer.learning_rate", "1", 1.0),
        ("train.remat", "true", True),
        ("data.shuffle", "0", False),
        ("model.path", "a=b:c,d", "a=b:c,d"),
        ("reward.weights", "", ""),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(config, key, text, value):
    cli.override(config, [(key, text)])
    now = dict(cli.flatten_config(config))[key]
    assert now == value and type(now) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.stepz", "7", r"train\.stepz: unknown config key; did you mean train\.steps\?"),
        ("train.learning_rate", "7", r"did you mean optimizer\.learning_rate\?"),
        ("beta", "7", r"did you mean preference\.beta\?"),
        ("train", "7", "train: unknown config key"),
        ("train.steps", "1e3", r"train\.steps: '1e3' is not a whole number"),
        ("train.steps", "", r"train\.steps: '' is not a whole number"),
        ("preference.beta", "much", r"preference\.beta: 'much' is not a number"),
        ("train.remat", "maybe", r"train\.remat: 'maybe' is not true or false"),
    ],
)
def test_an_unknown_key_or_a_wrong_type_is_named_with_the_fix(config, key, text, message):
    with pytest.raises(UserError, match=message):
        cli.override(config, [(key, text)])


def test_overrides_may_stand_before_config_and_in_two_words():
    argv = ["--config.seed=3", "--config=a.py", "--config.model.path", "x", "--workdir=w"]
    rest, overrides = cli.split_overrides(argv)
    assert rest == ["--config=a.py", "--workdir=w"]
    assert overrides == [("seed", "3"), ("model.path", "x")]


@pytest.mark.parametrize("argv", [["--config.seed"], ["--config.seed", "--workdir=w"]])
def test_an_override_without_value_is_refused(argv):
    with pytest.raises(UserError, match="seed: no value"):
        cli.split_overrides(argv)


def test_config_files_are_found_in_the_checkout_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.load_config("configs/vpo.py:tiny").train.steps == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py", None, "there is no file"),
        ("broken.py", "def get_config(:", "does not load"),
        ("empty.py", "", "no function get_config"),
        ("text.txt", "hello", "not a Python file"),
    ],
)
def test_a_config_file_that_is_none_is_a_user_error(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        cli.load_config(str(tmp_path / name))


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(UserError, match=r"there is no preset 'tinny'; choose one of .*tiny"):
        cli.load_config("configs/vpo.py:tinny")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train.stepz", "; did you mean train.steps?"),
        ("steps", "; did you mean train.steps?"),
        ("workdir", "; --help lists all"),
    ],
)
def test_only_a_similar_name_is_proposed(name, said):
    assert cli.nearest(name, ["train.steps", "reward.scorers", "seed"]) == said
    assert cli.nearest(name, []) == ""


def test_an_unknown_flag_names_the_nearest():
    parser = cli.Parser("vpo_jax.main", "")
    parser.add_argument("--workdir")
    with pytest.raises(UserError, match=r"--worksdir: unknown flag; did you mean --workdir\?"):
        parser.parse(["--worksdir=x"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a.b: wrong;\n mend it"), 2, "error: a.b: wrong; mend it\n"),
        (Interrupted(15), 143, "stopped by SIGTERM; the same command continues\n"),
        (Interrupted(2), 130, "stopped by SIGINT; the same command continues\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes_and_one_line_on_stderr(error, code, said, capsys):
    def command(argv):
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run(command, [])
    assert exit_.value.code == code and capsys.readouterr().err == said


def test_a_command_that_returns_exits_with_zero():
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda argv: None, [])
    assert exit_.value.code == 0


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    cli.write_output("", {"a": 1})
    cli.write_output(f"{tmp_path}/a.json", {"a": [1.5]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1.5\n  ]\n}\n'
    with pytest.raises(UserError, match=r"^--output: .*missing/a\.json cannot be written: No such file"):
        cli.write_output(f"{tmp_path}/missing/a.json", {})
    assert not (tmp_path / "missing").exists()
