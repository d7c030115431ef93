"""The one module that imports DeepSpeed: process groups, mesh, accelerator, and its two engines.

Devices are reached through DeepSpeed's accelerator, so that its CPU, CUDA, ROCm and NPU back ends, or a drop-in
replacement of the package, run by the same path. What DeepSpeed prints at start-up is kept from the console.
"""

import contextlib
import io
import itertools
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

# Neither finding no GPU, which DeepSpeed says while it is imported, nor an optimizer of our own is a reason to warn, on
# each rank and into the output of a command.
_EXPECTED = ("Setting accelerator to CPU", "ZeRO with an untested optimizer")
logging.getLogger("DeepSpeed").addFilter(lambda record: not any(one in record.getMessage() for one in _EXPECTED))
# ruff: noqa: E402

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from data_prep.errors import ConfigError
from kernels import fp8_product
from train.config import Config, PrecisionConfig
from train.layer_graphs import LayerGraphs
from train.main_grads import attach
from train.mesh import Mesh
from train.model.build import DTYPES, Model
from train.model.layers import PostNormLayer, PreNormLayer

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_graphs: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""All that `capture` made and somebody still holds."""


def _import_muon() -> None:
    """Each engine of DeepSpeed asks whether its optimizer is Muon; that import alone loads torch's inductor.

    Muon is not offered here, so its functions stay uncompiled, which saves each rank over a second of its start.
    """
    compiling, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiling


_import_muon()


def device() -> torch.device:
    """This rank's device."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator.device_name(int(os.environ.get("LOCAL_RANK", "0"))))


def device_name() -> str:
    """The accelerator's model name, such as `NVIDIA H100 80GB HBM3`, or `cpu`."""
    kind = str(get_accelerator().device_name())
    named = getattr(torch.get_device_module(kind), "get_device_name", None)
    return kind if kind == "cpu" or named is None else str(named())


def check_precision(precision: PrecisionConfig) -> None:
    """Raise ConfigError where the device cannot train in these formats."""
    accelerator, dtype = get_accelerator(), precision.dtype
    if dtype == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(f"precision.dtype=fp16: {device_name()} lacks it; use precision=bf16 or precision=fp32")
    if dtype == "bf16" and not accelerator.is_bf16_supported():
        raise ConfigError(f"precision.dtype=bf16: {device_name()} lacks it; use precision=fp16 or precision=fp32")
    if precision.fp8 and not fp8_product.runs_on(device()):
        raise ConfigError(
            f"precision.fp8=true: {device_name()} lacks it; use an NVIDIA GPU from Hopper on (H100, H200), or "
            "precision=bf16"
        )


def memory() -> dict[str, int]:
    """Bytes of device memory, as metrics fields: held now, at their peak since the last call, reserved; {} on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return {}
    peak, reserved = int(accelerator.max_memory_allocated()), int(accelerator.max_memory_reserved())
    held = int(accelerator.memory_allocated())
    accelerator.reset_peak_memory_stats()
    return {"memory_held_bytes": held, "memory_peak_bytes": peak, "memory_reserved_bytes": reserved}


def write_memory_snapshot(path: Path) -> bool:
    """Write every block that the device's allocator holds, for pytorch.org/memory_viz; False where it cannot tell.

    Called when memory is out, so whatever goes wrong here must not hide that.
    """
    allocator = getattr(torch.get_device_module(get_accelerator().device_name()), "memory", None)
    dump = getattr(allocator, "_dump_snapshot", None)
    if dump is None:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        dump(str(path))
    except (OSError, RuntimeError) as error:
        logger.warning("%s: the memory snapshot cannot be written (%s)", path, error)
        return False
    return True


def synchronize() -> None:
    """Wait until this rank's device has done all it was given."""
    get_accelerator().synchronize()


def capture(
    function: Callable[[], Result], *, rehearse: bool = True, pool: tuple[int, int] | None = None
) -> Callable[[], Result]:
    """A fixed sequence of device work as one graph: what comes back runs it again, into the same tensors each time.

    function: reads and writes tensors that stay where they are, and waits for nothing. rehearse: run it once here, to
    compile and allocate what it needs. pool: of `graph_pool`, shared by graphs of which one is over before the next
    begins. On a device without graphs the function itself comes back, and has not run.
    """
    accelerator = get_accelerator()
    graph = accelerator.create_graph()
    if graph is None:
        return function
    if rehearse:
        beside = accelerator.Stream()
        beside.wait_stream(accelerator.current_stream())
        with accelerator.stream(beside):
            function()
        accelerator.current_stream().wait_stream(beside)
    # Other threads (a save, the loader) go on allocating meanwhile.
    with torch.get_device_module().graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()

    _graphs.add(graph)

    def replay() -> Result:
        accelerator.replay_graph(graph)
        return result

    return replay


def results(run: Callable[[], None], result: torch.Tensor) -> Generator[list[Any]]:
    """What `result` holds after each run(), as a list, without end; close it when it is enough.

    On a GPU run() only queues work that the device does in its order, and each result is read while the next run is
    under way, so the device never waits for the reader; the last run is one too many.
    """
    accelerator = get_accelerator()
    if result.device.type == "cpu":
        while True:
            run()
            yield result.tolist()
    slots = [(torch.empty_like(result, device="cpu", pin_memory=True), accelerator.Event()) for _ in range(2)]
    try:
        for number in itertools.count():
            run()
            copy, done = slots[number % 2]
            copy.copy_(result, non_blocking=True)
            done.record()
            if number:
                copy, done = slots[(number - 1) % 2]
                done.synchronize()
                yield copy.tolist()
    finally:
        accelerator.synchronize()


def graph_pool() -> tuple[int, int] | None:
    """Memory for graphs that share it; None on a device without graphs."""
    if get_accelerator().create_graph() is None:
        return None
    pool: tuple[int, int] = torch.get_device_module().graph_pool_handle()
    return pool


def world_size() -> int:
    """Ranks that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_rank() -> int:
    """This process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def start() -> None:
    """Join the process group, with the environment that torchrun sets or, without it, alone."""
    deepspeed_logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if "RANK" not in os.environ:
        # Port 0: the system gives a free one.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    # DeepSpeed compiles a shared-memory collective at start-up on a CPU: 40 s, and 69 MB of /dev/shm a rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    with quiet():
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)


def stop() -> None:
    """Leave the process group, and give up every graph: a communicator waits for those that hold its collectives."""
    for graph in list(_graphs):
        graph.reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_mesh(config: Config) -> Mesh:
    """The layout of all ranks over data, tensor and pipeline axes, with its groups."""
    tensor, pipeline = config.parallel.tensor_parallel, config.parallel.pipeline_parallel
    ranks = torch.distributed.get_world_size()
    data = ranks // (tensor * pipeline)
    with quiet():
        topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
        grid = PipelineParallelGrid(topology=topology, process_group=torch.distributed.group.WORLD)
    rank = torch.distributed.get_rank()
    ends = None
    if pipeline > 1:
        for line in topology.get_axis_comm_lists("pipe"):
            pair = [line[0], line[-1]]
            group = torch.distributed.new_group(pair)
            ends = group if rank in pair else ends
    mesh = Mesh(
        device=device(),
        rank=rank,
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        data_rank=grid.get_data_parallel_rank(),
        tensor_rank=grid.get_slice_parallel_rank(),
        stage=grid.get_stage_id(),
        data_group=grid.get_data_parallel_group() if data > 1 else None,
        tensor_group=grid.get_slice_parallel_group() if tensor > 1 else None,
        pipeline_group=grid.get_pipe_parallel_group() if pipeline > 1 else None,
        embedding_group=ends,
        host_group=None if device().type == "cpu" else torch.distributed.new_group(backend="gloo"),
        grid=grid,
    )
    _connect(mesh)
    return mesh


def message_groups(mesh: Mesh) -> tuple[Any, Any]:
    """Two more groups of this rank's pipeline, for messages forward and backward: each moves its own in their order.

    All ranks call it together. A first message goes over each link, since connecting asks the device for memory.
    """
    found: list[Any] = []
    for _ in range(2):
        for line in mesh.grid.topology().get_axis_comm_lists("pipe"):
            options = None
            if get_accelerator().communication_backend_name() == "nccl":
                options = torch.distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
                # A message that waits for its other end keeps so many of the device's processors from computing.
                options.config.max_ctas = 4
            group = torch.distributed.new_group(line, pg_options=options)
            found += [group] if mesh.rank in line else []
    token = torch.zeros(1, device=mesh.device)
    for group, way in zip(found, (1, -1), strict=True):
        if 0 <= mesh.stage - way < mesh.pipeline:
            torch.distributed.recv(token, group=group, group_src=mesh.stage - way)
        if 0 <= mesh.stage + way < mesh.pipeline:
            torch.distributed.send(token, group=group, group_dst=mesh.stage + way)
    synchronize()
    return found[0], found[1]


def _connect(mesh: Mesh) -> None:
    """A first collective in each group: they connect here, so that a link that does not work shows before the model."""
    world = torch.distributed.group.WORLD
    for group in (world, mesh.data_group, mesh.tensor_group, mesh.pipeline_group, mesh.embedding_group):
        if group is not None:
            torch.distributed.all_reduce(torch.zeros(1, device=mesh.device), group=group)
    synchronize()


def tensor_mesh() -> Mesh:
    """All ranks as one tensor-parallel group, for a model that is only used."""
    config = Config()
    config.parallel.tensor_parallel = world_size()
    return make_mesh(config)


def make_plain_engine(config: Config, mesh: Mesh, optimizer_for: Any) -> tuple[Any, Model]:
    """DeepSpeed's plain engine over the whole model, for one stage and ZeRO 0 to 3.

    optimizer_for: function of the model that returns a torch optimizer.
    """
    model = Model(config, mesh, DTYPES[config.precision.dtype])
    if config.parallel.zero_stage == 3:
        # The fused kernels read parameters of several modules at once, so a layer is gathered as one.
        layer = PostNormLayer if model.context.post_norm else PreNormLayer
        set_z3_leaf_modules(model, [layer])
    # DeepSpeed's bf16 optimizer keeps what it concatenates together with the autograd graph of that: each parameter
    # would have one node for its gradient, tied to this stream for ever, and no other stream could be captured.
    with quiet(), torch.set_grad_enabled(not config.parallel.cuda_graphs):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer_for(model),
            config=_settings(config, mesh, model),
            mpu=mesh.grid,
            dist_init_required=False,
        )
    scatter = attach(engine, list(model.items))
    # A collective that is captured goes off in every micro-batch.
    model.scatter = None if config.parallel.cuda_graphs else scatter
    if config.parallel.cuda_graphs:
        if mesh.device.type == "cpu" and mesh.rank == 0:
            logger.warning("parallel.cuda_graphs has no effect on a CPU")
        trained = [
            parameter for item in model.items[1:-1] for parameter in item.parameters() if parameter.requires_grad
        ]
        model.graphs = LayerGraphs(trained, model.context.probe, partial(capture, rehearse=False, pool=graph_pool()))
    return engine, model


def make_pipeline_engine(config: Config, mesh: Mesh, optimizer_for: Any, loss_of: Any) -> tuple[Any, Model]:
    """DeepSpeed's pipeline engine, one `Model` a stage. loss_of(hidden) gives the last stage's loss."""
    with quiet():
        module = _Stages(config, mesh, loss_of)
        model = module.forward_funcs[0]
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer_for(model),
            config=_settings(config, mesh, model),
            dist_init_required=False,
        )
    scatter = attach(engine, list(model.items), model.tied_weight())
    # With zero bubble a layer's sums are not whole when its backward pass is over.
    model.scatter = None if config.parallel.pipeline_schedule == "zero_bubble" else scatter
    return engine, model


class _Stages(PipelineModule):
    """One item a stage: the stage's part of the model, which cuts the list by its own slot rule.

    The last stage's loss is part of its forward pass, not DeepSpeed's `loss_fn`: what runs after the module's forward
    has its gradient before DeepSpeed prepares the backward pass, and its bf16 optimizer then clears it.
    """

    def __init__(self, config: Config, mesh: Mesh, loss_of: Any) -> None:
        stage = LayerSpec(Model, config, mesh, DTYPES[config.precision.dtype])
        super().__init__(layers=[stage] * mesh.pipeline, topology=mesh.grid.topology(), partition_method="uniform")
        self._embedding_group = mesh.embedding_group
        self._loss_of = loss_of if mesh.last_stage else None
        head = self.forward_funcs[0].head
        if head is not None and config.model.tied_embeddings:
            # The copy on the last stage is the second one: it stays out of the gradient norm.
            head.weight.ds_pipe_replicated = True

    def forward(self, state: Any) -> Any:
        """The stage's `State`, or the loss on the last stage."""
        out = super().forward(state)
        return out if self._loss_of is None else self._loss_of(out)

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """The tied table's copy on this stage, whose gradient DeepSpeed sums with the other end's."""
        weight = self.forward_funcs[0].tied_weight()
        return [] if weight is None else [(weight, self._embedding_group)]


def _settings(config: Config, mesh: Mesh, model: Model) -> dict[str, Any]:
    """DeepSpeed's own config for this run."""
    parallel, precision, clip_kind = config.parallel, config.precision, config.optimizer.clip_kind
    elements = sum(parameter.numel() for parameter in model.parameters())
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    # DeepSpeed's pipeline and ZeRO 0 reduce at the end whatever is asked; in bf16 `train.scatter` reduces for ZeRO 1.
    fused_end = parallel.zero_stage == 0 or mesh.pipeline > 1
    fused_end |= parallel.zero_stage == 1 and precision.dtype == "bf16"
    overlaps = parallel.overlap_communication and mesh.device.type != "cpu" and not fused_end
    if parallel.overlap_communication and not overlaps and mesh.rank == 0:
        logger.warning("parallel.overlap_communication has no effect with this device, precision and layout")
    if parallel.zero_stage > 0:
        zero |= {
            # A bucket is allocated whole, so a small model must not pay for a large one's.
            "reduce_bucket_size": min(parallel.reduce_bucket_elements, elements),
            "allgather_bucket_size": min(parallel.allgather_bucket_elements, elements),
            "overlap_comm": overlaps,
        }
    if parallel.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": min(parallel.allgather_bucket_elements, elements)}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // (config.micro_batch_size * mesh.data),
        # ZeRO 0 clips in our own optimizer: DeepSpeed's counts a pipeline's tied table twice there. Other kinds of
        # clipping are the guard's (train/stability/guard.py).
        "gradient_clipping": 0.0 if parallel.zero_stage == 0 or clip_kind != "global" else config.optimizer.clip,
        "steps_per_print": None,
        # It would wait for the device round each micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
        # Between stages DeepSpeed sends each tensor-parallel rank a piece of what it takes for the same tensor on all
        # of them, and gathers it; shares of the sequence differ, and are pieces already.
        "pipeline": {
            "pipe_partitioned": not parallel.sequence_parallel,
            "grad_partitioned": not parallel.sequence_parallel,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision.dtype == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if precision.dtype == "fp16":
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": precision.loss_scale,
            "initial_scale_power": precision.loss_scale_initial_power,
            "loss_scale_window": precision.loss_scale_window,
            "hysteresis": precision.loss_scale_hysteresis,
            "min_loss_scale": precision.loss_scale_minimum,
        }
    return settings


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a library's prints from the console; they go to the debug log."""
    caught = io.StringIO()
    with contextlib.redirect_stdout(caught):
        yield
    if caught.getvalue():
        logger.debug("%s", caught.getvalue())
