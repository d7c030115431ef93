"""A plan as a few lines for a terminal."""

from typing import Any

from train.observers import duration, short

Record = dict[str, Any]


def summary(plan: Record) -> str:
    """The chosen layout, its memory and time, the runners-up and the reasons of the losers."""
    chosen, cluster, run = plan["chosen"], plan["cluster"], plan["run"]
    lines = [
        f"{plan['model']['name']}, {short(plan['model']['parameters'])} parameters, {short(run['tokens'])} tokens on "
        f"{cluster['nodes']} x {cluster['gpus_per_node']} {cluster['name']}",
        f"  layout   {chosen['layout']}",
        f"  memory   {chosen['memory_gib']:.1f} GiB{_of(cluster)}: {kinds(chosen['memory'])}",
        f"  step     {chosen['step_seconds']:.2f} s, {short(chosen['tokens_per_second'])} tokens/s, bubble "
        f"{100 * chosen['bubble']:.1f} %, MFU {100 * chosen['mfu']:.1f} %, HFU {100 * chosen['hfu']:.1f} %, attended "
        f"MFU {100 * chosen['mfu_attended']:.1f} %",
        f"  run      {chosen['days']:.1f} days, {chosen['petaflop_days']:,.0f} PF-days{_money(chosen)}",
        f"  failures {_failures(plan['failures'], chosen['days'])}",
    ]
    if "step" in plan:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in plan["step"].items() if value >= 0.005)
        lines.append(f"  seconds  {parts}")
        sent = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in plan["volumes"].items())
        lines.append(f"  sent     GB a rank and step: {sent}")
    if "search" in plan:
        lines += _search(plan["search"])
    return "\n".join(lines)


def kinds(memory: Record) -> str:
    """`weights 5.7, gradients 17.0` in GiB, largest first, what is under 50 MiB left out."""
    ordered = sorted(memory.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value / 2**30:.1f}" for name, value in ordered if value >= 0.05 * 2**30)


def _of(cluster: Record) -> str:
    return "" if cluster["memory_gib"] is None else f" of {cluster['memory_gib']:g}"


def _money(chosen: Record) -> str:
    text = f", {short(chosen['device_hours'])} device hours"
    if chosen["dollars"] is not None:
        text += f", {short(chosen['dollars'])} dollars"
    if chosen["megawatt_hours"] is not None:
        text += f", {chosen['megawatt_hours']:,.0f} MWh"
    return text


def _failures(failures: Record, days: float) -> str:
    return (
        f"one each {failures['job_mtbf_hours']:.1f} h; save each {duration(failures['daly_interval_seconds'])} "
        f"({failures['checkpoint_seconds']:.0f} s a save): goodput {100 * failures['goodput']:.1f} %, "
        f"{days / failures['goodput']:.1f} days"
    )


def _search(found: Record) -> list[str]:
    lines = [f"  {found['tried']} layouts tried, {found['fitting']} fit; the best:"]
    lines += [
        f"    {number:2}. {one['step_seconds']:7.2f} s  {one['memory_gib']:5.1f} GiB  MFU {100 * one['mfu']:4.1f} %  "
        f"{one['layout']}"
        for number, one in enumerate(found["best"], start=1)
    ]
    lines.append("  why others lose (TP x PP):")
    lines += [f"    {one['tensor_parallel']:3} x {sizes(one):<8} {one['why']}" for one in found["lost"]]
    return lines


def sizes(lost: Record) -> str:
    """Pipeline sizes of an entry, `12` or `48-64`."""
    found = lost["pipeline_parallel"]
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"
