"""Every knob once: its meaning, its unit, where its value comes from.

The values are the official repository's defaults ([C] = facebookresearch/dino at 7c446df); other recipes are the
deltas beside this file. Override any of them: `python train.py --config=configs/vits16.py --config.optim.lr=1e-3`.
"""

import os

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """ViT-S/16 as the official code trains it when no option is given."""
    config = ConfigDict()
    config.seed = 0  # of initial weights, data order, crops and drop paths
    config.batch_size = 512  # images in the global batch, over all devices and hosts [C: 64 a GPU, 8 GPUs]
    config.epochs = 100
    config.method = "dino"  # the page of the package that says how student and teacher learn: dino
    # Parts that a device walks its share of the batch in: saves memory; batch norm sees one part at a time.
    config.accum_steps = 1
    # Devices that share each large parameter, its moments and its teacher, for models too large for one; 1: none do.
    config.fsdp = 1
    # Of activations: bfloat16 | float32 | auto (float32 on CPU); parameters are float32 always. On GPU and TPU, float32
    # products take JAX's default precision (TF32, bfloat16 passes) unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
    config.dtype = "auto"
    config.log_every = 50  # steps
    config.writers = "console,jsonl,tensorboard"  # where scalars go: some of console, jsonl, tensorboard, wandb
    # Weights to start from: whatever dino_jax.load_backbone takes; empty: a random start. A resumed run reads its own.
    config.init_from = ""
    config.init_heads = True  # also heads and center, where init_from has them
    config.init_adapt = ""  # what may be changed to fit: image_size (positions resized), in_channels, or both (a,b)

    config.model = ConfigDict()
    # vit_nano | vit_tiny | vit_small | vit_base | vit_large | vit_giant | resnet18 | resnet50, or vit: of these sizes
    config.model.arch = "vit_small"
    config.model.embed_dim = 0  # channels of a token, a multiple of num_heads; 0: given by arch, as are the next two
    config.model.depth = 0  # blocks
    config.model.num_heads = 0  # attention heads of each block
    config.model.patch_size = 16  # pixels; ViTs only
    config.model.in_channels = 3
    config.model.drop_path_rate = 0.1  # stochastic depth of the last block, student only; 0 for convnets
    config.model.remat = False  # recompute blocks in the backward pass: less memory, more time
    config.model.unroll = False  # no loop over the blocks: less time, more memory, longer compilation
    # xla | cudnn (fused; NVIDIA GPUs from Ampere on, in bfloat16). Not measured yet, so that xla is the default.
    config.model.attention = "xla"

    config.head = ConfigDict()
    config.head.out_dim = 65_536  # K, prototypes
    config.head.hidden_dim = 2_048
    config.head.bottleneck_dim = 256
    config.head.layers = 3
    config.head.use_bn = False
    config.head.norm_last_layer = True  # gain of the prototypes fixed at 1: steadier, a little worse in long runs

    config.dino = ConfigDict()
    config.dino.student_temp = 0.1
    config.dino.teacher_temp = 0.04  # higher (0.07 with warm-up) for long runs
    config.dino.warmup_teacher_temp = 0.04
    config.dino.warmup_teacher_temp_epochs = 0
    config.dino.teacher_momentum = 0.996  # rises by a cosine to teacher_momentum_end; 0.9995 at batch 256 [C]
    config.dino.teacher_momentum_end = 1.0
    config.dino.center_momentum = 0.9
    # What the method needs and why: switch it off and see.
    config.dino.teacher_update = "ema"  # ema | epoch (the student at the end of each epoch) | copy (of each step)
    config.dino.centering = True  # without: one prototype wins
    config.dino.sharpening = True  # without: the teacher's temperature is the student's, and all outputs uniform

    config.loss_weights = ConfigDict()  # of the method's losses, each of which is logged as loss_NAME
    config.loss_weights.dino = 1.0

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw | sgd | lars
    config.optim.lr = 5e-4  # peak, for 256 images: times batch_size / 256
    config.optim.min_lr = 1e-6  # at the end of the cosine; not scaled
    config.optim.warmup_epochs = 10
    config.optim.weight_decay = 0.04  # rises by a cosine to weight_decay_end
    config.optim.weight_decay_end = 0.4
    config.optim.clip_grad = 3.0  # norm of each parameter tensor's gradient; 0: no clipping
    config.optim.freeze_last_layer_epochs = 1
    # Steps in a row that may be skipped because loss or gradient are not finite, before the run stops; 0: none.
    config.optim.max_skipped = 10
    # Times the 0.99 quantile of the last 1,000 gradient norms, above which a step is skipped, too; 0: none is.
    config.optim.skip_above = 0.0

    config.crops = ConfigDict()  # Caron et al. (2021); photometric values are BYOL's [C]
    config.crops.global_size = 224  # pixels
    config.crops.local_size = 96  # pixels
    config.crops.local_number = 8
    config.crops.global_scale = (0.4, 1.0)  # share of the image's area
    config.crops.local_scale = (0.05, 0.4)
    config.crops.flip = 0.5  # probability
    config.crops.jitter = 0.8  # probability of the next four, in random order
    config.crops.brightness = 0.4
    config.crops.contrast = 0.4
    config.crops.saturation = 0.2
    config.crops.hue = 0.1  # turns
    config.crops.grayscale = 0.2  # probability
    config.crops.global_blur = (1.0, 0.1)  # probability in the first and in the second global crop
    config.crops.local_blur = 0.5  # probability
    config.crops.blur_sigma = (0.1, 2.0)  # pixels
    config.crops.global_solarize = (0.0, 0.2)  # probability in the first and in the second global crop

    config.data = ConfigDict()
    config.data.source = ""  # folder:PATH | tfds:NAME[:SPLIT] | array_record:GLOB | demo
    config.data.canvas_size = 256  # pixels; each image is squeezed to a square of this side before it is cropped
    # Processes on each host that read and decode, by default a core each, but for one; 0: threads of the trainer.
    config.data.workers = max(1, min(8, (os.cpu_count() or 1) - 1))
    config.data.stall_timeout = 600.0  # seconds without a batch, after which the run ends, naming the workers; 0: any
    config.data.max_bad_fraction = 0.01  # of images that cannot be decoded, before the run stops
    config.data.mean = (0.485, 0.456, 0.406)  # of pixels in [0, 1], per channel (ImageNet)
    config.data.std = (0.229, 0.224, 0.225)

    config.eval = ConfigDict()  # how images are prepared for evaluation; exported with the backbone
    config.eval.resize = 256  # pixels, shorter side
    config.eval.crop = 224  # pixels
    config.eval.batch_size = 256  # images

    # Evaluations while training, each with its period and settings.
    config.evals = ConfigDict()
    config.evals.knn = ConfigDict()
    config.evals.knn.every_epochs = 10  # also before the first step and after the last; 0: never
    config.evals.knn.train = ""  # bank of labeled images; empty: data.source
    config.evals.knn.test = ""  # labeled queries; empty: no k-NN while training
    config.evals.knn.k = 20  # neighbors

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1_000
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_every_steps = 0  # keep these for good as well; 0: none
    config.checkpoint.stop_within = 25  # seconds from SIGTERM to the end; a longer step or compilation is cut off

    config.distributed = ConfigDict()
    config.distributed.auto = False  # True on Cloud TPU pods and under SLURM or MPI: hosts find each other
    config.distributed.coordinator = ""  # HOST:PORT of process 0, where nothing finds it by itself
    config.distributed.num_processes = 1
    config.distributed.process_id = 0
    config.distributed.timeout = 300  # seconds until all processes must have met
    config.distributed.heartbeat = 60  # seconds without a sign of life of a process, after which the others end
    # Steps between comparisons of the state that each device holds; 0: never.
    config.verify_every = 1_000

    config.watchdog = ConfigDict()
    config.watchdog.seconds = 1_800  # that a step, or waiting for its data, may take before the run ends; 0: any time
    config.watchdog.slow_seconds = 7_200  # the same of compilation, evaluations, checkpoints

    return config.lock()
