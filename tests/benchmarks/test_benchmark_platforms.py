"""The verdict on two machines' curves."""

from pathlib import Path

import pytest

from benchmarks.platforms import compare, read
from data_prep.errors import DataError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("factor", "status"), [(1 + 0.9e-4, 0), (1 - 1.1e-4, 1)])
def test_curves_may_differ_by_a_ten_thousandth(
    factor: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = tmp_path / "cpu.csv"
    gpu = tmp_path / "gpu.csv"
    cpu.write_text("# a processor\nstep,fp32_loss,fp32_grad_norm\n1,8.0,2.0\n2,4.0,1.0\n", "utf-8")
    gpu.write_text(
        "# a card\nstep,fp32_loss,fp32_grad_norm,fp16_loss,fp16_grad_norm\n"
        f"1,8.0,2.0,8.0,nan\n2,{4.0 * factor},1.5,4.4,1.0\n",
        "utf-8",
    )
    assert compare(read(cpu), read(gpu), tmp_path / "figure.png") == status
    said = capsys.readouterr().out
    assert "| 5.0e-01 | " in said  # fp32's gradient norm
    assert "| fp16 | 1.0e-01 | 0.0e+00 | 4.400000 |" in said  # the overflow has no norm
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpu.csv").write_text("# nothing\n", "utf-8")
    with pytest.raises(DataError, match=r"cpu\.csv"):
        read(tmp_path / "cpu.csv")
