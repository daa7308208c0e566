"""All settings, with their meaning, unit and the source of the default value.

The values are the defaults of the official repository ([C] = facebookresearch/dino at 7c446df). The other recipes
change some of them. Any setting can be set on the command line: `dino-jax train --config=vits16
--config.optim.lr=1e-3`. `dino-jax train --help` prints the comments below.
"""

import os

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """ViT-S/16 with the default options of the official code."""
    config = ConfigDict()
    config.seed = 0  # for the initial weights, data order, crops and drop paths
    config.batch_size = 512  # images in the global batch, over all devices and hosts [C: 64 per GPU, 8 GPUs]
    config.epochs = 100.0  # passes over the data; fractions are rounded to whole steps
    # How student and teacher learn: dino | dinov2, or a variant for the ablation: dino_mse | dino_predictor |
    # dino_sinkhorn | dino_sinkhorn_predictor.
    config.method = "dino"
    # Number of parts of a device's batch that are computed one after another to save memory. Batch norm sees one part.
    config.accum_steps = 1
    # Devices that each large parameter is split over (with its moments and its teacher), for models that are too large
    # for one device.
    config.fsdp = 1
    # Type of activations: bfloat16 | float32 | auto (float32 on a CPU, else bfloat16). Parameters are always float32.
    # On GPU and TPU, float32 products use JAX's default precision (TF32, bfloat16 passes) unless
    # JAX_DEFAULT_MATMUL_PRECISION=highest is set.
    config.dtype = "auto"
    config.log_every = 50  # steps between logged metrics; the first and the last step are logged as well
    config.writers = "console,jsonl,tensorboard"  # where metrics go: any of console, jsonl, tensorboard, wandb
    # Weights to start from, in any form that dino_jax.load_backbone reads; empty: random. A resumed run ignores it.
    config.init_from = ""
    config.init_heads = True  # also load heads and center, if init_from has them
    config.init_adapt = ""  # what may be adapted: image_size (resizes position embeddings), in_channels, or both (a,b)

    config.model = ConfigDict()
    # vit_nano | vit_tiny | vit_small | vit_base | vit_large | vit_giant | xcit_small_12 | xcit_medium_24 | resnet18 |
    # resnet50, or vit (sizes below)
    config.model.arch = "vit_small"
    config.model.embed_dim = 0  # channels of a token, a multiple of num_heads; only for arch vit, else 0
    config.model.depth = 0  # number of blocks; only for arch vit, else 0
    config.model.num_heads = 0  # attention heads of each block; only for arch vit, else 0
    config.model.patch_size = 16  # pixels; ViTs and XCiTs (8 or 16)
    config.model.registers = 0  # register tokens, which collect global information; ViTs only (DINOv2: 0 or 4)
    config.model.layer_scale = 0.0  # initial factors of residual branches; 0: none; ViTs only (DINOv2: 1e-5)
    config.model.ffn = "mlp"  # mlp | swiglu: network after attention in each block; ViTs only
    # Resize positions to other image sizes with antialiasing, as DINOv2 does with registers; ViTs only.
    config.model.antialias = False
    config.model.in_channels = 3  # channels of the images
    # Stochastic depth of the student: of the last block (DINO) or of all blocks (DINOv2); 0 for XCiTs and convnets.
    config.model.drop_path_rate = 0.1
    config.model.remat = False  # recompute blocks in the backward pass: less memory, more time
    config.model.unroll = False  # unroll the loop over the blocks: less time, more memory, longer compilation
    # xla | cudnn (fused; NVIDIA GPUs, Ampere or newer, in bfloat16). xla is the default because cudnn is not measured.
    config.model.attention = "xla"

    config.head = ConfigDict()  # projection head of student and teacher
    config.head.out_dim = 65_536  # number of prototypes, K
    config.head.hidden_dim = 2_048  # width of the hidden layers
    config.head.bottleneck_dim = 256  # width of the normalized layer before the prototypes
    config.head.layers = 3  # layers of the MLP, the bottleneck included
    config.head.use_bn = False  # batch norm in the hidden layers
    config.head.norm_last_layer = True  # fix the gain of the prototypes at 1: more stable, slightly worse in long runs

    config.dino = ConfigDict()  # targets, teacher and center, also of DINOv2
    config.dino.student_temp = 0.1  # temperature of the student's softmax
    config.dino.teacher_temp = 0.04  # after the warmup; 0.07 with a warmup for long runs
    config.dino.warmup_teacher_temp = 0.04  # at the start; rises linearly to teacher_temp
    config.dino.warmup_teacher_temp_epochs = 0.0  # length of that warmup
    config.dino.teacher_temp_changes = "epoch"  # how often it rises: every epoch | step
    config.dino.teacher_momentum = 0.996  # weight of the old teacher in each update; 0.9995 for batch 256 [C]
    config.dino.teacher_momentum_end = 1.0  # reached on a cosine at the last step
    config.dino.center_momentum = 0.9  # of the moving average of the teacher's logits
    # Parts of the method that the ablation disables.

    # ema (moving average) | epoch (copy of the student at the end of each epoch) | copy (of the student at each step)
    config.dino.teacher_update = "ema"
    config.dino.centering = True  # False: outputs collapse to one prototype
    config.dino.sharpening = True  # False: the teacher uses the student's temperature, and outputs become uniform

    config.dinov2 = ConfigDict()  # only for method dinov2
    # center (moving average, as in DINO) | sinkhorn (all prototypes get the same share of each batch)
    config.dinov2.targets = "center"
    # Images, consecutive in the global batch, that stand for a GPU of the official code: masks and drop paths are drawn
    # for them together, and KoLeo compares them. It must divide the images that a device processes at a time.
    config.dinov2.group_images = 16
    config.dinov2.mask_probability = 0.5  # share of the global crops that the student sees with a mask
    config.dinov2.mask_ratio = (0.1, 0.5)  # range of the share of patches that are masked in them
    config.dinov2.separate_head = False  # patches have a head of their own, with the next two sizes
    config.dinov2.patch_out_dim = 65_536  # number of its prototypes
    config.dinov2.patch_bottleneck_dim = 256  # width of its bottleneck

    config.loss_weights = ConfigDict()  # weights of the method's losses, which are logged as loss_NAME
    config.loss_weights.dino = 1.0  # cross-entropy between the teacher's and the student's outputs
    config.loss_weights.mse = 1.0  # squared distance between the two outputs; only dino_mse, in place of dino
    config.loss_weights.ibot = 1.0  # the same at masked patches; only DINOv2
    config.loss_weights.koleo = 0.1  # spreads the features of different images; only DINOv2

    config.optim = ConfigDict()  # optimizer and its schedules
    config.optim.name = "adamw"  # adamw | sgd | lars
    config.optim.lr = 5e-4  # peak learning rate before scaling by lr_rule
    config.optim.lr_rule = "linear"  # linear (batch_size / 256) | sqrt (the square root of batch_size / 1024)
    config.optim.min_lr = 1e-6  # learning rate at the end of the cosine; not scaled
    config.optim.warmup_epochs = 10.0  # the learning rate rises linearly from 0
    config.optim.weight_decay = 0.04  # rises on a cosine to weight_decay_end
    config.optim.weight_decay_end = 0.4  # at the last step
    config.optim.clip_grad = 3.0  # largest norm of a gradient; 0: no clipping
    config.optim.clip_by = "tensor"  # which norm: of each parameter tensor | module (of backbone and heads)
    config.optim.layer_decay = 1.0  # factor of the learning rate from each layer of a ViT to the one before it
    config.optim.patch_embed_lr = 1.0  # factor of the learning rate of the patch embedding
    config.optim.freeze_last_layer_epochs = 1.0  # first epochs in which the prototypes are not trained
    config.optim.freeze_backbone_epochs = 0.0  # first epochs in which only heads train (batch norm statistics move)
    config.optim.freeze_by = "gradient"  # how prototypes are not trained: gradient (none, also for Adam) | lr (0)
    # Largest number of steps in a row that are skipped because of a non-finite loss or gradient; more stop the run.
    config.optim.max_skipped = 10
    # Also skip a step whose gradient norm exceeds the 0.99 quantile of the last 1,000 by this factor; 0: never.
    config.optim.skip_above = 0.0

    config.crops = ConfigDict()  # Caron et al. (2021); photometric values are BYOL's [C]
    config.crops.global_size = 224  # side of the two global crops, pixels
    config.crops.local_size = 96  # side of the local crops, pixels
    config.crops.local_number = 8  # local crops per image
    config.crops.global_scale = (0.4, 1.0)  # range of a global crop's share of the image's area
    config.crops.local_scale = (0.05, 0.4)  # range of a local crop's share of the image's area
    config.crops.flip = 0.5  # probability of a horizontal flip
    config.crops.jitter = 0.8  # probability of changes of brightness, contrast, saturation and hue, in random order
    config.crops.brightness = 0.4  # largest change, as a share
    config.crops.contrast = 0.4  # largest change, as a share
    config.crops.saturation = 0.2  # largest change, as a share
    config.crops.hue = 0.1  # largest change, as a share of the color wheel
    config.crops.grayscale = 0.2  # probability
    config.crops.global_blur = (1.0, 0.1)  # probability in the first and in the second global crop
    config.crops.local_blur = 0.5  # probability in a local crop
    config.crops.blur_sigma = (0.1, 2.0)  # range of the standard deviation, pixels
    config.crops.blur_taps = 0  # 0: Pillow's blur, as in DINO; an odd number: a kernel of so many pixels (DINOv2: 9)
    config.crops.global_solarize = (0.0, 0.2)  # probability in the first and in the second global crop

    config.data = ConfigDict()  # images and how they are read
    # folder:PATH | tfds:NAME[:SPLIT] | array_record:GLOB | wds:SHARDS.tar | parquet:FILES | hf:NAME[:SPLIT] |
    # zip:PATH | demo
    config.data.source = ""
    # Pixels. A longer side of an image is squeezed to this before crops are taken, which makes them softer; a shorter
    # one is kept. 512 holds ImageNet's images (about 500 x 375). Host memory, transfer and crops grow with its square.
    config.data.canvas_size = 512
    # Processes on each host that read and decode images; 0: threads of the trainer.
    config.data.workers = max(1, min(8, (os.cpu_count() or 1) - 1))
    config.data.stall_timeout = 600.0  # seconds without a batch after which the run exits; 0: no limit
    config.data.max_bad_fraction = 0.01  # largest share of images that cannot be decoded; more stop the run
    # Values of black and white in images of more than 8 bits, such as (0,4095) for 12-bit scans; values outside are
    # clipped. (0,0): 0 and 65,535 for 16-bit integers, 0 and 1 for floats; wider integers are refused.
    config.data.range = (0.0, 0.0)
    config.data.dtype = "uint8"  # uint8 | uint16 | float32: of the canvases; deep images lose nothing in the last two
    config.data.shown = (0, 1, 2)  # channels that pictures show as red, green and blue, if there are more than three
    config.data.mean = (0.485, 0.456, 0.406)  # of pixels in [0, 1], for each channel (ImageNet)
    config.data.std = (0.229, 0.224, 0.225)  # of pixels in [0, 1], for each channel (ImageNet)

    config.eval = ConfigDict()  # preprocessing of images for evaluation; exported with the backbone
    config.eval.resize = 256  # shorter side of the images, pixels
    config.eval.crop = 224  # side of the center crop, pixels
    config.eval.batch_size = 256  # images over all devices

    config.evals = ConfigDict()  # evaluations during training, each with its period and settings
    config.evals.knn = ConfigDict()
    config.evals.knn.every_epochs = 10  # also before the first step and after the last; 0: never
    config.evals.knn.train = ""  # bank of labeled images; empty: data.source
    config.evals.knn.test = ""  # labeled queries; empty: no k-NN during training
    config.evals.knn.k = 20  # neighbors
    config.evals.probe = ConfigDict()  # measures without labels, see docs/health.md
    config.evals.probe.every_epochs = 5  # also before the first step and after the last; 0: never
    config.evals.probe.images = 2_048  # images of data.source, spread evenly
    config.evals.probe.pairs = 2  # pairs of augmented global crops of each image
    config.evals.pictures = ConfigDict()
    # Nearest neighbors, attention and components of patches, for TensorBoard, WORKDIR/pictures and the report; also
    # before the first step and after the last; 0: never.
    config.evals.pictures.every_epochs = 25

    config.health = ConfigDict()
    config.health.report = True  # write WORKDIR/report.html at the end of `dino-jax train`, on one process
    config.health.stop = "never"  # collapse: a run whose outputs are the same for all images ends with exit code 77

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1_000  # steps between checkpoints
    config.checkpoint.keep_last = 2  # newest checkpoints to keep
    config.checkpoint.keep_every_steps = 0  # also keep the checkpoints at all multiples of this step; 0: none
    config.checkpoint.stop_within = 25  # longest time from SIGTERM to exit, seconds; interrupts longer steps

    config.distributed = ConfigDict()  # runs of several processes
    config.distributed.auto = False  # True on Cloud TPU pods, SLURM and MPI, which detect the next three settings
    config.distributed.coordinator = ""  # HOST:PORT of process 0, unless auto is set
    config.distributed.num_processes = 1  # processes of the run
    config.distributed.process_id = 0  # index of this process, from 0
    config.distributed.timeout = 300  # seconds within which all processes must connect
    config.distributed.heartbeat = 60  # seconds without a sign of life from a process after which the others exit
    # Steps between comparisons of the states that the devices hold; 0: never.
    config.verify_every = 1_000

    config.watchdog = ConfigDict()  # exits when the run hangs
    config.watchdog.seconds = 1_800  # longest time for a step, or the wait for its data; 0: no limits
    config.watchdog.slow_seconds = 7_200  # longest time for a compilation, an evaluation or a checkpoint

    return config.lock()
