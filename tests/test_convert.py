import json

import pytest

from vpo_jax import convert, main
from vpo_jax.families.text_to_video_sd.family import TextToVideoSD
from vpo_jax.runtime import cli


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as done:
        cli.run(convert.main, argv)
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ")
    return said


@pytest.mark.slow
def test_the_newest_checkpoint_is_the_export(finished, tmp_path, capsys):
    workdir = finished[0]
    convert.main([f"--workdir={workdir}", f"--output={tmp_path}/model"])
    assert files_of(tmp_path / "model") == files_of(workdir / "export")
    assert "the policy weights of step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_an_extrapolated_average_comes_out_as_the_run_exported_it(job, tmp_path):
    workdir = tmp_path / "run"
    main.main([*job, f"--workdir={workdir}", "--config.ema.decay=0.5", "--config.ema.extrapolation=2.0"])
    convert.main([f"--workdir={workdir}", f"--output={tmp_path}/average"])
    assert files_of(tmp_path / "average") == files_of(workdir / "export")

    convert.main([f"--workdir={workdir}", f"--output={tmp_path}/policy", "--weights=policy"])
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "policy" / unet).read_bytes() != (tmp_path / "average" / unet).read_bytes()


def test_an_older_step_is_another_model(finished, tmp_path):
    workdir = finished[0]
    convert.main([f"--workdir={workdir}", "--step=1", f"--output={tmp_path}/model"])
    ours, theirs = files_of(tmp_path / "model"), files_of(workdir / "export")
    assert {path for path in ours if ours[path] != theirs[path]} == {
        path for path in ours if (path.parts[0] == "unet" and path.suffix == ".safetensors") or path.name == "README.md"
    }


def test_lora_only_is_an_adapter_folder(finished, tmp_path, capsys):
    convert.main([f"--workdir={finished[0]}", f"--output={tmp_path}/adapter", "--lora_only"])
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["target_modules"]
    assert "PeftModel.from_pretrained(pipe.unet" in capsys.readouterr().out


@pytest.mark.slow
def test_a_family_chooses_the_form_of_an_adapter_and_a_flag_another(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TextToVideoSD, "adapter_forms", ("diffusers", "peft"))
    shown = staticmethod(lambda folder, base, form, components: [f"load {form} {folder} on {base} {components}"])
    monkeypatch.setattr(TextToVideoSD, "adapter_lines", shown)
    files = {}
    for name, flags in (("default", []), ("peft", ["--lora_format=peft"]), ("diffusers", ["--lora_format=diffusers"])):
        convert.main([f"--workdir={finished[0]}", f"--output={tmp_path}/{name}", "--lora_only", *flags])
        form = "peft" if name == "peft" else "diffusers"
        assert f"    load {form} {tmp_path}/{name} on " in capsys.readouterr().out
        card = (tmp_path / name / "README.md").read_text()
        assert f"load {form} THIS_FOLDER" in card and f'library_name: "{form}"' in card
        files[name] = files_of(tmp_path / name)
    assert {str(path) for path in files["default"]} == {"pytorch_lora_weights.safetensors", "README.md"}
    assert files["default"] == files["diffusers"]
    assert "original" in refusal(
        capsys, f"--workdir={finished[0]}", f"--output={tmp_path}/no", "--lora_only", "--lora_format=original"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--lora_only", "--lora_format=diffusers"],
            "--lora_format: TextToVideoSDPipeline has no adapters of the form diffusers; choose one of peft",
        ),
        (["--lora_only", "--lora_format=foo"], "--lora_format: invalid choice: 'foo'"),
        (["--lora_format=peft"], "--lora_format: is the form of an adapter; give --lora_only too"),
        (["--step=9"], "no checkpoint of step 9; there are 1, 2"),
        (["--weights=ema"], "this run kept no average"),
        (["--weights=best"], "invalid choice: 'best'"),
        (["--step=two"], "invalid int value: 'two'"),
        (["--stap=2"], "--stap: unknown flag; did you mean --step?"),
    ],
)
def test_a_flag_that_does_not_fit_is_named(finished, tmp_path, capsys, flags, message):
    assert message in refusal(capsys, f"--workdir={finished[0]}", f"--output={tmp_path}/model", *flags)
    assert not (tmp_path / "model").exists()


def test_a_directory_that_is_no_run_is_named(tmp_path, capsys):
    assert "there is no" in refusal(capsys, f"--workdir={tmp_path}", f"--output={tmp_path}/model")
    assert "required: --output" in refusal(capsys, f"--workdir={tmp_path}")


def test_an_output_that_is_something_else_is_left_alone(finished, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years")
    refusal(capsys, f"--workdir={finished[0]}", f"--output={tmp_path}")
    refusal(capsys, f"--workdir={finished[0]}", f"--output={tmp_path}", "--lora_only")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_export_loads_with_the_printed_lines(finished, tmp_path, capsys, dtype):
    torch = pytest.importorskip("torch", reason="diffusers needs it")
    convert.main([f"--workdir={finished[0]}", f"--output={tmp_path}/model", f"--dtype={dtype}"])
    code = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    scope: dict = {}
    exec("\n".join(code), scope)
    parts = (scope["pipe"].unet, scope["pipe"].vae, scope["pipe"].text_encoder)
    assert {part.dtype for part in parts} == {getattr(torch, dtype)}
