"""A plan as a person reads it: its parts, what is sent, and what would save memory."""

from rich.table import Table

from models.precision import SCALES, TABLES
from train.planner import plan as planning
from train.planner.gpus import GIB, MIB, Gpu
from train.planner.plan import LABELS, STATES, Plan
from train.planner.switches import Switch


def table(planned: Plan, card: Gpu | None, name: str) -> Table:
    """Every part of the plan, a line each; of a model that is shared, the whole of it and what a device has."""
    shared, parts = planned.job.shared, planned.parts
    columns = ("whole, MiB", "each, MiB") if shared else ("MiB",)
    made = Table("", "numbers", "stored as", *columns, title=name, title_justify="left")
    for column in made.columns[1:]:
        column.justify = "right"

    def add(text: str, own: int, whole: int | None = None, numbers: str = "", kind: str = "") -> None:
        made.add_row(text, numbers, kind, *((mib(whole), mib(own)) if shared else (mib(own),)))

    for part in planned.base:
        kinds = {kind: nbytes for kind, nbytes in part.nbytes.items() if kind != TABLES}
        for i, (kind, nbytes) in enumerate(kinds.items()):
            label = planning.SCALES if kind == SCALES else planning.CODES if kind.endswith(" codes") else part.name
            own = (parts.get(label, 0) if i == 0 or label != part.name else 0) if shared else nbytes
            add(part.name if i == 0 else "", own, nbytes, f"{part.parameters:,}" if i == 0 else "", kind)
    made.add_section()
    stored = sum(sum(part.nbytes.values()) for part in planned.base)
    own = sum(parts.get(label, 0) for label in base_labels()) if shared else stored
    add("model and adapters", own, stored, f"{planned.base.parameters:,}")
    for label, text in LABELS.items():
        if parts.get(label) and label not in base_labels():
            add(text + (" (pageable)" if label == STATES and planned.managed else ""), parts[label])
    made.add_section()
    add(f"all tensors {planned.moment}", planned.total)
    if planned.managed:
        add("what cannot be paged out", planned.needed)
    if card is not None:
        rest = "CUDA context, NCCL and fragments" if planned.job.processes > 1 else "CUDA context and fragments"
        add(rest, planned.takes(card) - planned.needed)
    if planned.host:
        add("in the CPU's memory", sum(planned.host.values()))
    return made


def base_labels() -> tuple[str, ...]:
    """What `base` in a plan counts already."""
    return tuple(LABELS)[: tuple(LABELS).index(planning.GRADIENTS)]


def mib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / MIB:,.1f}"


def sending(planned: Plan) -> str:
    """What is sent in a step, in words."""
    traffic = planned.traffic
    rounds = f"{traffic.rounds} micro-batches" if traffic.rounds > 1 else "one micro-batch"
    said = f"a step is {rounds} for each process, which sends (and receives) at least {traffic.sent / GIB:,.2f} GiB: "
    if traffic.all_reduced:
        return said + f"gradients of {traffic.all_reduced / GIB:,.2f} GiB, twice their part"
    gradients = f"once gradients, {traffic.part(traffic.reduced) / GIB:,.2f} GiB"
    return (
        said
        + f"weights of other processes for each micro-batch, {traffic.sent_in_round / GIB:,.2f} GiB, and {gradients}"
    )


def table_of_switches(alone: list[Switch], card: Gpu) -> Table:
    """What each change gives for itself."""
    made = Table("each for itself", "costs", "GiB", "", title="What would save memory", title_justify="left")
    for switch in alone:
        fits = "fits" if switch.plan.fits(card) else ""
        made.add_row(switch.flags, switch.cost, f"{switch.plan.takes(card) / GIB:.1f}", fits)
    return made
