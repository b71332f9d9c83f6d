"""The embedded shapes job: a small video model that ships with the package becomes steadier.

    python -m vpo_jax.main --config=configs/vpo.py

Takes about ten minutes on two fast CPU cores, and more on slow ones. Results: a table of base against tuned,
`report.html` and `export/`, a diffusers folder. The preset `tiny` runs the same stages in seconds and learns nothing;
`shapes_wan` tunes a small Wan model, which ships too:

    python -m vpo_jax.main --config=configs/vpo.py:tiny
    python -m vpo_jax.main --config=configs/vpo.py:shapes_wan

Your own checkpoint, prompts and scorer:

    python -m vpo_jax.main --config=configs/vpo.py:custom --config.model.path=DIR_OR_HUB_ID \\
        --config.data.prompts=FILE --config.reward.scorers=DIR --config.rollout.num_frames=16 ...

Three checkpoints of 1.4 billion parameters have presets; each one below says its hardware, memory and time:

    python -m vpo_jax.main --config=configs/vpo.py:modelscope --config.model.path=DIR_OR_HUB_ID \\
        --config.data.prompts=prompts.txt --config.reward.scorers=SCORER
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset: "" is the embedded job, "tiny" runs it in seconds; `PRESETS` lists all."""
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; choose one of {', '.join(p or '(none)' for p in PRESETS)}")
    config = _shapes()
    PRESETS[preset](config)
    return config


def _shapes() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.path = "shapes"  # or "shapes_wan", which ship; a diffusers folder; a hub id
    config.model.dtype = "float32"  # of computation and frozen weights; or "bfloat16"
    config.model.attention = "xla"  # "cudnn" is faster on NVIDIA GPUs; its gradients do not repeat to the bit

    config.data = ConfigDict()
    config.data.prompts = "shapes:train"  # shapes:SPLIT, or a file: .txt (one a line), .json, .jsonl, .csv, .tsv
    config.data.held_out = "shapes:held_out"  # of the final comparison; "" reserves a tenth of data.prompts
    config.data.shuffle = True
    config.data.text_cache = ""  # a folder: all prompts are encoded once to a file in it, and the text encoder is freed

    config.reward = ConfigDict()
    config.reward.scorers = "shapes"  # comma-separated: shapes, videoscore, videoreward, a folder, MODULE:FUNCTION
    config.reward.weights = ""  # comma-separated scorer/dimension=weight; 1 where not given
    config.reward.offload = False  # keep scorers' weights in host memory and copy them to the devices every step
    config.reward.devices = 0  # number of devices that only score, while the others sample the next candidates
    config.reward.timeout = 600.0  # seconds for a call of your own function, after which the run stops; 0 = no limit
    config.reward.videoscore = ConfigDict()  # read where scorers name videoscore; see docs/scorers.md
    config.reward.videoscore.path = ""  # the folder of its weights
    config.reward.videoscore.query_prompt = ""  # a file; "" = query_prompt.txt of the folder
    config.reward.videoscore.frame_choice = "arange"  # or "linspace", as in its authors' benchmark
    config.reward.videoscore.max_frames = 16  # up to 48 for v1.1
    config.reward.videoscore.attention = "xla"  # "cudnn" is faster on NVIDIA GPUs
    config.reward.videoreward = ConfigDict()  # read where scorers name videoreward
    config.reward.videoreward.path = ""
    config.reward.videoreward.query_prompt = ""
    config.reward.videoreward.video_fps = 8.0  # frames a second of the videos that the model makes
    config.reward.videoreward.attention = "xla"  # as above

    config.held_out = ConfigDict()
    config.held_out.scorers = "judge"  # for evaluation only, never for the loss; "classical" scores any videos

    config.algorithm = ConfigDict()
    config.algorithm.name = "dpo"

    config.rollout = ConfigDict()
    config.rollout.candidates = 4
    config.rollout.trunk_level = 0.0  # above 0: candidates share one video, noised up to this share of the schedule
    config.rollout.num_inference_steps = 16
    config.rollout.guidance_scale = 2.0
    config.rollout.guidance_scale_2 = 0.0  # of a second expert, for low noise (Wan 2.2 A14B); 0 = guidance_scale
    config.rollout.guidance_rescale = 0.0  # 0 to 1; above 0 reduces overexposure
    config.rollout.negative_prompt = ""
    config.rollout.num_frames = 8  # 0 here and below: the model's default
    config.rollout.height = 32
    config.rollout.width = 32
    config.rollout.sampler = ""  # "" = the one of scheduler_config.json
    config.rollout.eta = 0.0
    config.rollout.shift = 0.0  # flow models: towards noise, of sampling and of updates; 0 = scheduler_config.json's
    config.rollout.microbatch = 0  # videos at a time; 0 = all at once

    config.preference = ConfigDict()
    config.preference.pairs = "best_worst"  # pairs: best_worst, top_k, all; a prompt's whole group: group, listwise
    config.preference.top_k = 2  # for pairs=top_k: number of best, and of worst candidates
    config.preference.beta = 500.0
    config.preference.margin = 0.5  # least difference of a pair, in units of the combined reward
    config.preference.motion_tolerance = 0.5  # by how much the winner's dynamic degree may be lower, in z units
    config.preference.label_temperature = 0.0  # 0 = hard labels
    config.preference.winner_safeguard = False
    config.preference.winner_safeguard_mu = 0.9
    config.preference.winner_penalty = 0.0
    config.preference.anchor = 0.0  # weight of the distance to the initial policy's predictions; 0 = off
    config.preference.max_pair_age = 0  # steps; 0 = strictly online
    config.preference.caption_dropout = 0.0
    config.preference.timestep_low = 0.0  # lowest timestep of updates, as a share of the schedule; 0 = clean
    config.preference.timestep_high = 1.0  # highest timestep; 1 = noise
    config.preference.timestep_density = "logit_normal"  # of flow models, before the shift; or "uniform"

    config.reference = ConfigDict()
    config.reference.schedule = "refresh"  # refresh, frozen, ema or adaptive
    config.reference.every = 200
    config.reference.decay = 0.99

    config.ema = ConfigDict()
    config.ema.decay = 0.0  # 0 = off
    config.ema.extrapolation = 1.0  # factor on the average's distance from the initial policy, in the result

    config.lora = ConfigDict()
    config.lora.rank = 16  # 0 = full fine-tuning
    config.lora.alpha = 16.0
    config.lora.path = ""  # an adapter's folder or file: policy and reference start from base + adapter
    config.lora.targets = ""  # comma-separated patterns of module paths; "" = every attention layer
    config.lora.merge = False  # merge adapters into kernels inside programs: faster for small layers; float32 only

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
    config.train.microbatch = 0  # pairs at a time, with accumulated gradients; 0 = the whole batch
    config.train.remat = False

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1  # steps
    config.checkpoint.keep = 2

    config.eval = ConfigDict()
    config.eval.every = 4  # steps between evaluations on tuning prompts; 0 = none
    config.eval.prompts = 96
    config.eval.on_alarm = "warn"  # or "stop"; docs/metrics.md lists the alarms
    config.eval.seed = 1_000_000
    config.eval.num_inference_steps = 0  # of the final comparison; 0 = rollout's
    config.eval.guidance_scale = 0.0  # of the final comparison; 0 = rollout's
    config.eval.shift = 0.0  # of the final comparison; 0 = rollout's

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1 = the rest of the devices
    config.mesh.fsdp = 1
    config.mesh.context = 1
    config.mesh.tensor = 1
    config.mesh.rollout = ""  # axes for sampling on the same devices, as "data=4,context=2"; "" = as above
    config.mesh.score = ""  # axes for scoring, likewise, or on reward.devices; others are 1, data the rest
    config.mesh.cpu_devices = 0  # without an accelerator: devices that share the cores; 0 = one a core, if that divides

    config.profile = ConfigDict()
    config.profile.steps = ""  # "3:5" traces steps 3 and 4 into WORKDIR/profile, for TensorBoard or xprof

    config.log = ConfigDict()
    config.log.every = 1  # steps
    config.log.tensorboard = True
    config.log.samples = 4  # videos an evaluation

    return config


def _embedded(config: ConfigDict) -> None:
    """About ten minutes on two CPU cores that sample 64 videos of five steps in 2 s.

    Every layer has adapters: the convolutions cause flicker and jitter, and adapters on attention alone cannot change
    them. Rollouts have few sampling steps and many videos, and all candidates of a prompt are learnt from by their
    advantage, with one timestep and one noise for the whole group. Rollouts have no guidance: they cost half and
    differ more, and what is learnt from them shows in the guided samples that are compared. The result is a short
    average of the policy. The anchor and `visual_quality` keep the colours. The weights follow the agreement of the
    shipped scorer with the judge on the model's own samples: highest for temporal consistency, none for factual
    consistency (docs/tuning.md).
    """
    config.lora.targets = "."
    config.lora.merge = True
    config.optimizer.learning_rate = 5e-4
    config.train.steps = 120
    config.train.prompts_per_step = 8
    config.train.updates_per_step = 1
    config.rollout.candidates = 8
    config.rollout.num_inference_steps = 5
    config.rollout.guidance_scale = 1.0
    config.rollout.microbatch = 16
    config.preference.pairs = "group"
    config.preference.beta = 1000.0
    config.preference.anchor = 15.0
    config.preference.margin = 0.25
    config.preference.motion_tolerance = 1.0
    config.preference.timestep_low = 0.5
    config.preference.timestep_high = 0.85
    config.reference.schedule = "frozen"
    config.ema.decay = 0.9
    config.checkpoint.every = 4
    config.eval.every = 40
    config.eval.num_inference_steps = 16
    config.eval.guidance_scale = 2.0
    config.reward.weights = ",".join(
        f"shapes/{dimension}={weight}"
        for dimension, weight in {
            "temporal_consistency": 5,
            "visual_quality": 2,
            "text_to_video_alignment": 2,
            "dynamic_degree": 0.25,
            "factual_consistency": 0,
        }.items()
    )


def _pairs(config: ConfigDict) -> None:
    """The embedded job as it was before groups: the best against the worst, and an extrapolated average.

    The policy's own samples do not get better while it trains; what the result gains comes from the extrapolation
    (docs/experiments.md).
    """
    _embedded(config)
    config.rollout.guidance_scale = 2.0
    config.optimizer.learning_rate = 4e-4
    config.train.steps = 48
    config.train.updates_per_step = 2
    config.preference.anchor = 60.0
    config.preference.pairs = "best_worst"
    config.preference.label_temperature = 1.0
    config.ema.decay = 0.98
    config.ema.extrapolation = 5.0


def _shapes_wan(config: ConfigDict) -> None:
    """The embedded job on a small Wan model: a rectified flow, a causal video autoencoder, 9 frames.

    Four minutes on one CPU core once it is compiled. It is compared without guidance too: its guided samples have few
    flaws left, and a policy that learns from them drifts towards them (docs/experiments.md).
    """
    _embedded(config)
    config.model.path = "shapes_wan"
    config.rollout.num_frames = 9
    config.preference.beta = 300.0  # errors of a velocity are four times those of the default job
    config.preference.timestep_low = 0.2
    config.preference.timestep_high = 0.7
    config.eval.every = 60
    config.eval.guidance_scale = 1.0


def _tiny(config: ConfigDict) -> None:
    """Runs every stage of the embedded job in seconds; learns nothing."""
    config.rollout.num_inference_steps = 2
    config.rollout.candidates = 2
    config.train.steps = 2
    config.train.prompts_per_step = 2
    config.train.updates_per_step = 1
    config.eval.every = 1
    config.eval.prompts = 4
    config.log.samples = 2


def _custom(config: ConfigDict) -> None:
    """Your own checkpoint, prompts and scorers; the sizes are the model's defaults.

    Learning rate and beta are those of Diffusion-DPO. The microbatches are one video and one pair on each of eight
    chips; lower rollout.microbatch and train.microbatch on fewer chips. `python -m vpo_jax.plan` says what fits.
    """
    config.model.path = ""  # a diffusers folder or a hub id
    config.data.prompts = ""  # a file: .txt (one a line), .json, .jsonl, .csv, .tsv
    config.data.held_out = ""
    config.reward.scorers = ""  # a scorer's folder; several, comma-separated
    config.held_out.scorers = ""  # name one that is not used for training

    config.rollout.num_inference_steps = 25
    config.rollout.guidance_scale = 9.0
    config.rollout.num_frames = config.rollout.height = config.rollout.width = 0
    config.rollout.microbatch = 8

    config.preference.beta = 5000.0  # equals Diffusion-DPO's 2500: u has a factor 1/2 here, and errors are means
    config.lora.rank = 64
    config.lora.alpha = 64.0
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 20

    config.train.steps = 1000
    config.train.prompts_per_step = 8
    config.train.updates_per_step = 4
    config.train.microbatch = 8
    config.train.remat = True

    config.checkpoint.every = 20
    config.eval.every = 50
    config.eval.prompts = 32


def _full_size(config: ConfigDict, num_frames: int, height: int, width: int, guidance_scale: float) -> None:
    """What the three large models share: `_custom` with a bfloat16 backbone, on eight chips.

    Memory a chip, calculated: backbone 2.8 GB in bfloat16, text encoder 1.4 GB and autoencoder 0.3 GB in float32,
    LoRA of 26.6 M parameters 0.5 GB (policy, reference, gradient and two moments in float32), a scorer of VideoScore's
    size 16.5 GB; activations are not included. The host holds no copy of the model: it stays on disk.
    Chips with less memory hold everything but the scorer, which mesh.score shards over them (docs/plans.md).
    On fewer than eight chips lower rollout.microbatch and train.microbatch to what fits; nothing else changes.
    """
    _custom(config)
    config.model.dtype = "bfloat16"
    config.rollout.guidance_scale = guidance_scale
    config.rollout.num_frames = num_frames
    config.rollout.height = height
    config.rollout.width = width


def _modelscope(config: ConfigDict) -> None:
    """damo-vilab/text-to-video-ms-1.7b (weights CC-BY-NC-4.0: not for commercial use), 16 frames of 256x256.

    Hardware: eight chips of 80 GB, or one with microbatches of 2.
    Time, calculated and not measured: 10.8 PFLOP a step (4 candidates of 25 steps with guidance, decoding, 16 frames
    of VideoScore, 4 updates with rematerialisation), so at 40 % of an H100's 790 TFLOP/s 34 s a step on one, 4.3 s
    on eight; 1000 steps in 9.5 h and 1.2 h.
    """
    _full_size(config, num_frames=16, height=256, width=256, guidance_scale=9.0)


def _zeroscope(config: ConfigDict) -> None:
    """cerspense/zeroscope_v2_576w (weights CC-BY-NC-4.0: not for commercial use), 24 frames of 576x320.

    Its hub folder holds pickled weights; convert them: `python tools/pickle_to_safetensors.py FOLDER` first.
    Hardware: eight chips of 80 GB.
    Time, calculated and not measured: 43.8 PFLOP a step, as in `modelscope`, so at 40 % of an H100's
    790 TFLOP/s 139 s a step on one, 17 s on eight; 1000 steps in 39 h and 4.8 h.
    """
    _full_size(config, num_frames=24, height=320, width=576, guidance_scale=9.0)


def _videocrafter2(config: ConfigDict) -> None:
    """VideoCrafter2 (weights Apache-2.0; OnlineVPO's base model), 16 frames of 512x320.

    Convert its file first: `python -m vpo_jax.convert --from_videocrafter=model.safetensors --base=DIR --output=DIR`.
    Its own script samples with 50 steps and eta 1; 25 steps with eta 0 take half of the time.
    Hardware: eight chips of 80 GB.
    Time, calculated and not measured: 26.2 PFLOP a step, as in `modelscope`, so at 40 % of an H100's
    790 TFLOP/s 83 s a step on one, 10 s on eight; 1000 steps in 23 h and 2.9 h.
    """
    _full_size(config, num_frames=16, height=320, width=512, guidance_scale=12.0)


def _wan_of_size(config: ConfigDict, num_frames: int, height: int, width: int) -> None:
    """What the presets of Wan share: `_custom` in bfloat16, VideoReward, groups of candidates, a text cache.

    Sizes are those of public reinforcement learning on Wan 2.1 1.3B: 33 frames of 240x416, 20 steps, guidance 4.5
    (Flow-GRPO). Rank and alpha, beta and the learning rate are a start: no recipe of preference learning on Wan with a
    measured gain is known. umT5's 5.7 billion parameters encode every prompt once and leave the devices.
    """
    _custom(config)
    config.model.dtype = "bfloat16"
    config.data.text_cache = "text_cache"  # a folder
    config.reward.scorers = "videoreward"
    config.reward.videoreward.video_fps = 16.0
    config.rollout.num_inference_steps = 20
    config.rollout.guidance_scale = 4.5
    config.rollout.num_frames = num_frames
    config.rollout.height = height
    config.rollout.width = width
    config.preference.pairs = "group"
    config.preference.beta = 500.0
    config.lora.rank = 64
    config.lora.alpha = 128.0
    config.train.updates_per_step = 1


def _wan(config: ConfigDict) -> None:
    """Wan-AI/Wan2.1-T2V-1.3B-Diffusers (Apache-2.0), 33 frames of 240x416.

    Hardware: one chip of 80 GB, 47 GB by the planner (42 with model.attention=cudnn); or one of 16 GB with microbatches
    of 1 (docs/plans.md).
    Time, calculated and not measured: 18 PFLOP a step, so at 40 % of an H100's 790 TFLOP/s 52 s a step on one, 6.5 s
    on eight; 1000 steps in 15 h and 1.8 h.
    """
    _wan_of_size(config, num_frames=33, height=240, width=416)


def _wan_14b(config: ConfigDict) -> None:
    """Wan-AI/Wan2.1-T2V-14B-Diffusers (Apache-2.0), 33 frames of 240x416.

    Hardware: one chip of 80 GB with microbatches of 1, 56 GB by the planner (47 with model.attention=cudnn).
    Time, calculated and not measured: 143 PFLOP a step, so at 40 % of an H100's 790 TFLOP/s 360 s a step on one, 45 s
    on eight; 1000 steps in 4.2 days and 12.6 h.
    """
    _wan_of_size(config, num_frames=33, height=240, width=416)


def _wan22_a14b(config: ConfigDict) -> None:
    """Wan-AI/Wan2.2-T2V-A14B-Diffusers (Apache-2.0): two experts of 14 billion parameters, adapters on both.

    Hardware, by the planner: four H100, 64 GB on each, with model.attention=cudnn, mesh.fsdp=4 and microbatches of 4
    (docs/plans.md). Time: as `wan_14b`.
    The shift is its authors', not scheduler_config.json's 3, with which quality suffers. To adapt the expert for high
    noise alone: `lora.targets="^\\.transformer\\..*attn"` and `preference.timestep_low=0.37`, from where on it denoises
    at a shift of 12.
    """
    _wan_14b(config)
    config.rollout.shift = 12.0
    config.rollout.guidance_scale = 4.0
    config.rollout.guidance_scale_2 = 3.0


def _wan22_5b(config: ConfigDict) -> None:
    """Wan-AI/Wan2.2-TI2V-5B-Diffusers (Apache-2.0) as text-to-video, 33 frames of 480x832 at 24 a second.

    Its autoencoder decodes at 4 to 7 times the cost of one forward pass of its transformer.
    Hardware: one chip of 80 GB with microbatches of 1, 36 GB by the planner.
    Time, calculated and not measured: at 40 % of an H100's speed 154 s a step on one.
    """
    _wan_of_size(config, num_frames=33, height=480, width=832)
    config.reward.videoreward.video_fps = 24.0


PRESETS = {
    "": _embedded,
    "pairs": _pairs,
    "shapes_wan": _shapes_wan,
    "tiny": _tiny,
    "custom": _custom,
    "modelscope": _modelscope,
    "zeroscope": _zeroscope,
    "videocrafter2": _videocrafter2,
    "wan": _wan,
    "wan_14b": _wan_14b,
    "wan22_a14b": _wan22_a14b,
    "wan22_5b": _wan22_5b,
}
