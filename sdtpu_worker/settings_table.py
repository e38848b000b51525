"""The table of all `sdtpu_*` settings: name, default, parser and documentation of each; `config.py` reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdtpu_worker.config_values import (
    parse_address,
    parse_choice,
    parse_dotted_path,
    parse_embedding_sources,
    parse_http_keys,
    parse_integer,
    parse_lora_sources,
    parse_loras,
    parse_named,
    parse_optional_text,
    parse_origins,
    parse_priorities,
    parse_queue,
    parse_resolutions,
    parse_reuse,
    parse_seconds,
    parse_slots,
    parse_switch,
    parse_text,
    parse_urls,
)
from sdtpu_worker.contract.queues import DEFAULT_QUEUE


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: as in the app's configuration.
        default: its value where it is not set.
        parse: returns the value of a string from the environment, or of an object from the app's configuration. Raises
            ValueError with the words for what is allowed.
        doc: what it does, in sentences; the last one without its full stop.
    """

    name: str
    default: Any
    parse: Callable[[Any], Any]
    doc: str


SETTINGS = (
    Setting(
        "sdtpu_model", "embedded", parse_text,
        "The checkpoint to serve: a folder, or a repository on the Hugging Face hub, in the diffusers layout with"
        " weights in safetensors or msgpack, or one `.safetensors` file in the original layout. `embedded` and the"
        " distilled `embedded-turbo` are small checkpoints that the package brings",
    ),
    Setting(
        "sdtpu_revision", "main", parse_text,
        "The branch, tag or commit of a checkpoint from the hub; many repositories keep their Flax weights in the"
        " branch `bf16`. A checkpoint in a folder has none",
    ),
    Setting(
        "sdtpu_tokenizer", None, parse_optional_text,
        "A folder with CLIP's vocabulary, or a checkpoint's folder with it in `tokenizer/`, for a checkpoint in one"
        " `.safetensors` file, which has none",
    ),
    Setting(
        "sdtpu_prediction_type", "auto", parse_choice("auto", "epsilon", "v_prediction"),
        "What the model of a checkpoint in one `.safetensors` file predicts. `auto`: as the file or its architecture"
        " says; a Stable Diffusion 2.x in one file needs it",
    ),
    Setting(
        "sdtpu_loras_merged", (), parse_loras,
        "LoRAs to merge into the checkpoint when the worker starts: `.safetensors` files, folders with one, names on"
        " the hub (`owner/name` or `owner/name/file.safetensors`) or `embedded-outline`, which the package brings for"
        " its checkpoint; each with a weight after an equals sign (1 without), with commas between them, or pairs of"
        " name and weight. Results name them",
    ),
    Setting(
        "sdtpu_loras", None, parse_lora_sources,
        "LoRAs that single jobs can name (`loras`): `name=source` with commas between them, or a dictionary, with"
        " sources as in `sdtpu_loras_merged`; or a folder, each of whose `.safetensors` files is a LoRA under its name"
        " without the ending. A file that is added to the folder is found without a restart. Not set, the program has"
        " no place for them and costs nothing more",
    ),
    Setting(
        "sdtpu_lora_rank", 16, parse_integer(1, 256),
        "The rank that the programs of `sdtpu_loras` have room for: the ranks of all LoRAs of a job add up to no more."
        " A larger one takes more memory and time in every step",
    ),
    Setting(
        "sdtpu_embeddings", None, parse_embedding_sources,
        "Textual inversion: words that prompts may use, each with vectors out of a file. `word=source` with commas"
        " between them, or a dictionary, with sources as in `sdtpu_loras_merged`; or a folder, each of whose"
        " `.safetensors` files is a word under its name without the ending. They are read when the worker starts",
    ),
    Setting(
        "sdtpu_prompt_windows", 3, parse_integer(1, 16),
        "How many windows of 75 tokens the prompt of a job with `prompt_syntax=\"weighted\"` may have; a longer one"
        " fails with `InvalidRequest`. Only devices that have a job with several windows spend time on them, but for"
        " a few thousandths of a step on a TPU; with 1 the program has no place for more",
    ),
    Setting(
        "sdtpu_guidance", "auto", parse_choice("auto", "on", "off"),
        "Whether every job has a row in the batch for its negative prompt, without which guidance scales above 1 are"
        " refused and a step costs half. `auto`: as the checkpoint needs; distilled ones need none",
    ),
    Setting(
        "sdtpu_image_inputs", True, parse_switch,
        "Whether jobs may start from a picture (image to image, inpainting). When it is off, the worker keeps no"
        " encoder for pictures on the devices, compiles faster, and refuses such jobs",
    ),
    Setting(
        "sdtpu_controlnets", {}, parse_named,
        "ControlNets for the checkpoint, by the name that jobs call them: `name=source` with commas between them, or a"
        " dictionary. A source is a folder in the diffusers layout or a repository on the hub. Each adds to the"
        " program that is compiled, and costs nothing while no job asks it",
    ),
    Setting(
        "sdtpu_platform", "auto", parse_choice("auto", "tpu", "gpu", "cpu"),
        "The devices to run on. With `tpu`, `gpu` or `cpu` the worker does not start without such devices; `auto` takes"
        " the devices that JAX finds, and logs them. `gpu` needs the extra `gpu`, `tpu` the extra `tpu`",
    ),
    Setting(
        "sdtpu_cpu_devices", 8, parse_integer(1, 64),
        "The number of devices that a worker on the CPU simulates; other platforms ignore it",
    ),
    Setting(
        "sdtpu_dtype", "auto", parse_choice("auto", "bfloat16", "float32"),
        "The number format that the devices compute in. `auto` is bfloat16 on an accelerator and float32 on the CPU",
    ),
    Setting(
        "sdtpu_slots_per_device", 1, parse_slots,
        "How many jobs one device denoises at the same time. `auto` measures 1, 2, 4 and 8 at the first start and keeps"
        " the best number for later starts",
    ),
    Setting(
        "sdtpu_resolutions", None, parse_resolutions,
        "The image sizes to serve, height x width in pixels. `sdxl` stands for nine of those that Stable Diffusion XL"
        " was trained on. Every size is compiled and has slots of its own. Not set, only the checkpoint's own size"
        " is served; a job of a size that is not served fails with `InvalidRequest`",
    ),
    Setting(
        "sdtpu_vae_tiling", "auto", parse_choice("auto", "on", "off"),
        "Whether the autoencoder decodes an image in overlapping tiles, one after the other, which takes less memory,"
        " more time, and changes pixels a little. `auto`: only if the programs do not fit the devices' memory"
        " otherwise",
    ),
    Setting(
        "sdtpu_attention", "auto", parse_choice("auto", "plain", "packed", "cudnn"),
        "How the devices compute attention. `auto`: as a table says for the platform and each layer's size; the worker"
        " logs what it chose. `plain` is the compiler's own everywhere, `packed` the kernel for TPUs, `cudnn` that of"
        " NVIDIA's library; a platform that has not what is asked for is refused. It changes pixels by rounding",
    ),
    Setting(
        "sdtpu_tick_s", 0.1, parse_seconds(0.001, 60),
        "How many seconds of device work one dispatch holds, at least one denoising step. Jobs join and leave between"
        " two dispatches, so a shorter tick reacts sooner and a longer one costs the host less",
    ),
    Setting(
        "sdtpu_preemption", True, parse_switch,
        "Whether a job may take the slot of a less urgent one, which is parked and resumes later at the same step. When"
        " it is off, every job keeps its slot to its end",
    ),
    Setting(
        "sdtpu_reuse", "off", parse_reuse,
        "Whether the stored image of a finished job answers an equal one, and equal jobs in flight are drawn once:"
        " `off`; `on`, among jobs of the same tenant; `across_tenants`, among all jobs. All workers of a queue should"
        " have the same value",
    ),
    Setting(
        "sdtpu_progress_s", 0.5, parse_seconds(0, 3600),
        "Seconds between two PROGRESS states of a running job; 0 publishes none",
    ),
    Setting(
        "sdtpu_preview_every", 0, parse_integer(0, 1000),
        "How many denoising steps lie between two small previews in the PROGRESS state; 0 makes none",
    ),
    Setting(
        "sdtpu_trace", None, parse_text,
        "The file to which the worker writes a timeline of its ticks and jobs, in Chrome's trace format, which Perfetto"
        " opens. Not set, no timeline is written",
    ),
    Setting(
        "sdtpu_queue", DEFAULT_QUEUE, parse_queue,
        "The queue of the task `sdtpu.generate`; clients and workers must have the same name",
    ),
    Setting(
        "sdtpu_tenant_shards", 16, parse_integer(0, 256),
        "How many queues the jobs with a `tenant` are spread over; a worker serves the queues in turn. With 0 all jobs"
        " share one queue. Clients and workers must have the same number",
    ),
    Setting(
        "sdtpu_max_queue", 0, parse_integer(0, 10**9),
        "How many jobs of the same or a higher urgency may wait in a job's queue before `delay()` raises `QueueFull`; 0"
        " sets no limit",
    ),
    Setting(
        "sdtpu_max_message_bytes", 262_144, parse_integer(4096, 2**27),
        "The largest task message, in bytes, that the worker reads. A larger one is dead-lettered, and its job fails"
        " with `InvalidMessage` where its task id can be read",
    ),
    Setting(
        "sdtpu_lease_s", 30.0, parse_seconds(1, 86_400),
        "Seconds that a message stays with its worker without renewal. When a worker dies, its messages are redelivered"
        " after this time; when Redis does not answer for longer, `/livez` fails",
    ),
    Setting(
        "sdtpu_stall_s", 60.0, parse_seconds(1, 86_400),
        "Seconds that a tick may be late before its devices count as hung: the leases are then not renewed, and other"
        " workers get the jobs",
    ),
    Setting(
        "sdtpu_grace_s", 25.0, parse_seconds(0, 86_400),
        "Seconds after SIGTERM in which the worker finishes its jobs. It hands over the jobs that need longer; with 0"
        " it hands over all of them at once",
    ),
    Setting(
        "sdtpu_max_deliveries", 3, parse_integer(1, 1000),
        "How many workers may die, hang or lose their devices with a job on them before the job fails with"
        " `DeliveryLimitExceeded`",
    ),
    Setting(
        "sdtpu_health_address", None, parse_address,
        "The address, `host:port`, at which the worker answers `/livez`, `/readyz` and `/metrics`. An empty host means"
        " every interface, port 0 any free port; not set, the worker does not listen",
    ),
    Setting(
        "sdtpu_log_prompts", False, parse_switch,
        "Whether log lines may hold prompts. When it is off, only lines at level DEBUG may",
    ),
    Setting(
        "sdtpu_log_format", "text", parse_choice("text", "json"),
        "The form of the worker's log lines: `text` is Celery's own (`worker_log_format`), `json` is one JSON object a"
        " line. In both, every line that a job's code logs names its task",
    ),
    Setting(
        "sdtpu_image_store", "redis", parse_text,
        "Where the worker stores images: `redis` for the result backend's Redis, with the expiry of the results; or a"
        " `redis://` URL; or an fsspec URL (`file:///…`, `gs://…`, `s3://…`). Clients read from the same place",
    ),
    Setting(
        "sdtpu_read_image_stores", (), parse_urls,
        "Further stores to read images from, such as the one before `sdtpu_image_store` was changed: each as for"
        " `sdtpu_image_store`, in a list, or in one string with commas between them. An image anywhere else is refused",
    ),
    Setting(
        "sdtpu_http_address", ("127.0.0.1", 8090), parse_address,
        "The address, `host:port`, at which `sdtpu serve` answers. An empty host means every interface",
    ),
    Setting(
        "sdtpu_http_keys", (), parse_http_keys,
        "The callers of the door, each with the SHA-256 of its key, as `sdtpu key` prints them. Without keys the door"
        " serves its own machine only",
    ),
    Setting(
        "sdtpu_http_open", False, parse_switch,
        "Whether a door without keys serves callers on other machines too, all as one caller",
    ),
    Setting(
        "sdtpu_http_metrics_keys", (), parse_http_keys,
        "Who may read the door's `/metrics`, each with the SHA-256 of its key, as `sdtpu key` prints them. They open"
        " nothing else, and a key of `sdtpu_http_keys` does not open `/metrics`",
    ),
    Setting(
        "sdtpu_http_cors_origins", (), parse_origins,
        "The origins whose web pages may use the door from a browser, like `https://shop.example`. Not set, none may",
    ),
    Setting(
        "sdtpu_http_webhook_origins", (), parse_origins,
        "The origins to which the door may post jobs that have ended (`webhook`), like `https://shop.example`",
    ),
    Setting(
        "sdtpu_http_webhook_secret", None, parse_optional_text,
        "What the door signs webhooks with; their receivers know it too",
    ),
    Setting(
        "sdtpu_http_max_body_bytes", 16_777_216, parse_integer(1024, 2**27),
        "The largest body of a request to the door, in bytes; a picture that a job starts from is in it",
    ),
    Setting(
        "sdtpu_http_wait_s", 300.0, parse_seconds(1, 86_400),
        "Seconds that a request which waits for its pictures may wait, as those of OpenAI's API do. Its jobs are then"
        " cancelled",
    ),
    Setting(
        "sdtpu_http_max_streams", 4000, parse_integer(1, 1_000_000),
        "How many event streams one door keeps open; each needs a file descriptor",
    ),
    Setting(
        "sdtpu_http_page", True, parse_switch,
        "Whether the door shows its page, on which people make pictures in a browser. The page itself needs no key; it"
        " asks for one where the door has keys",
    ),
    Setting(
        "sdtpu_web_page", False, parse_switch,
        "Whether the Flask blueprint and the Django app show the page, too, at `page/` below the jobs API",
    ),
    Setting(
        "sdtpu_web_owner", None, parse_dotted_path,
        "The function by which the Django app finds whose request it is, like `shop.owners.find_owner`: it takes the"
        " request and returns a text, or None for nobody. Not set, it is the user that has logged in, else the session",
    ),
    Setting(
        "sdtpu_web_priorities", (6, 9), parse_priorities,
        "The most and the least urgent priority that users of the Flask blueprint and of the Django app may ask for",
    ),
    Setting(
        "sdtpu_web_max_jobs", 0, parse_integer(0, 10**9),
        "How many unfinished jobs a user of the Flask blueprint or of the Django app may have; 0 for any number",
    ),
    Setting(
        "sdtpu_web_max_streams", 4, parse_integer(0, 10_000),
        "How many event streams a process of a WSGI server keeps open, and how many requests wait for their job"
        " (`Prefer: wait`): each holds one of its threads",
    ),
    Setting(
        "sdtpu_web_stream_s", 30.0, parse_seconds(1, 3600),
        "Seconds after which an event stream of a WSGI server ends and frees its thread. A browser comes back by itself"
        " and gets what is newer",
    ),
    Setting(
        "sdtpu_compile_cache", "auto", parse_text,
        "The folder of compiled programs: JAX's persistent compilation cache, and in `programs/` whole programs, which"
        " a start loads without tracing; those hold machine code, so that nobody but the worker's user and root may be"
        " able to write the folder. `auto` is `~/.cache/sdtpu_worker/xla`; with `off` every start compiles anew",
    ),
    Setting(
        "sdtpu_programs", None, parse_optional_text,
        "A folder of whole programs that `sdtpu compile` made ahead, as for an image. A start looks there first, and"
        " only reads it; nobody but the worker's user and root may be able to write it",
    ),
)  # fmt: skip
