"""The embedded shapes job: a small video model that ships with the package becomes steadier and sharper.

    python -m vpo_jax.main --config=configs/vpo.py

Takes under 15 minutes on two CPU cores and ends with a table of base against tuned, `report.html` and
`export/`, a diffusers folder. The preset `tiny` walks through the same stages in seconds and learns nothing:

    python -m vpo_jax.main --config=configs/vpo.py:tiny

Your own checkpoint, prompts and scorer:

    python -m vpo_jax.main --config=configs/vpo.py --config.model.path=DIR --config.data.prompts=FILE \\
        --config.reward.scorers=DIR --config.rollout.num_frames=16 --config.rollout.height=256 ...
"""

from ml_collections import ConfigDict

PRESETS = ("", "tiny")


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset: "" is the embedded job, "tiny" the same in seconds."""
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; choose one of {', '.join(p or '(none)' for p in PRESETS)}")
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.path = "shapes"  # the shipped model, a diffusers folder, or a hub id
    config.model.dtype = "float32"  # of compute and frozen weights; or "bfloat16"

    config.data = ConfigDict()
    config.data.prompts = "shapes:train"  # the world's captions, a text file (one a line) or .jsonl with "prompt"
    config.data.held_out = "shapes:held_out"  # the closing comparison's prompts; never trained on
    config.data.shuffle = True

    config.reward = ConfigDict()
    config.reward.scorers = "shapes"  # comma-separated names or folders
    config.reward.weights = ""  # comma-separated scorer/dimension=weight; absent = 1

    config.held_out = ConfigDict()
    config.held_out.scorers = "judge"  # judge the result, never the loss

    config.rollout = ConfigDict()
    config.rollout.candidates = 4
    config.rollout.num_inference_steps = 16
    config.rollout.guidance_scale = 2.0
    config.rollout.negative_prompt = ""
    config.rollout.num_frames = 8  # 0 here and below: what the model was made for
    config.rollout.height = 32
    config.rollout.width = 32
    config.rollout.sampler = ""  # "" takes the one that scheduler_config.json names
    config.rollout.eta = 0.0
    config.rollout.microbatch = 0  # videos at a time; 0 = all at once

    config.preference = ConfigDict()
    config.preference.beta = 500.0
    config.preference.margin = 0.5  # in units of the combined reward
    config.preference.motion_tolerance = 0.5  # winner's dynamic degree may be lower by this much, in z units
    config.preference.label_temperature = 0.0  # 0 = hard labels
    config.preference.winner_safeguard = False
    config.preference.winner_safeguard_mu = 0.9
    config.preference.winner_penalty = 0.0
    config.preference.anchor = 0.0
    config.preference.max_pair_age = 0  # steps; 0 = strictly online
    config.preference.caption_dropout = 0.0

    config.reference = ConfigDict()
    config.reference.schedule = "refresh"  # refresh, frozen, ema or adaptive
    config.reference.every = 200
    config.reference.decay = 0.99

    config.ema = ConfigDict()
    config.ema.decay = 0.0  # 0 = off

    config.lora = ConfigDict()
    config.lora.rank = 16  # 0 = full fine-tuning
    config.lora.alpha = 16.0
    config.lora.targets = ""  # comma-separated patterns of module paths; "" = every attention

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 5  # updates
    config.optimizer.weight_decay = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 1.0

    config.train = ConfigDict()
    config.train.steps = 12
    config.train.prompts_per_step = 16
    config.train.updates_per_step = 6
    config.train.microbatch = 0  # pairs at a time, gradients accumulated; 0 = the whole batch
    config.train.remat = False

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1  # steps
    config.checkpoint.keep = 2

    config.eval = ConfigDict()
    config.eval.every = 4  # steps; looks at tuning prompts, 0 = none
    config.eval.prompts = 96
    config.eval.on_alarm = "warn"  # or "stop": motion lost, winners forgotten, a held-out judge that falls
    config.eval.seed = 1_000_000

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1 = the rest of the devices
    config.mesh.fsdp = 1
    config.mesh.context = 1
    config.mesh.tensor = 1

    config.log = ConfigDict()
    config.log.every = 1  # steps
    config.log.tensorboard = True
    config.log.samples = 4  # videos a look

    if preset == "tiny":
        config.rollout.num_inference_steps = 2
        config.rollout.candidates = 2
        config.train.steps = 2
        config.train.prompts_per_step = 2
        config.train.updates_per_step = 1
        config.eval.every = 1
        config.eval.prompts = 4
        config.log.samples = 2
    return config
