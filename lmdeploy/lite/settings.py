"""What the flags of the quantizing commands say, checked. It knows no model and does no work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmdeploy.errors import ConfigError

AWQ, GPTQ, SMOOTH_QUANT = "auto_awq", "auto_gptq", "smooth_quant"
BITS = {AWQ: (4,), GPTQ: (4, 8)}
GROUP_SIZES = (128, 64, 32)
SEARCHES = ("none", "awq", "best")
QUANT_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn", "float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2"}
"""Values of --quant-dtype, and the dtype that each means."""


@dataclass(frozen=True)
class CalibrationSettings:
    """Which text a model reads. batch_size: least number of windows computed together."""

    work_dir: Path
    calib_dataset: str = "wikitext2"
    calib_samples: int = 128
    calib_seqlen: int = 2048
    batch_size: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.calib_samples < 2 and not (self.calib_samples == 0 and self.may_be_blind):
            none = ", or 0 to round the weights without any text" if self.may_be_blind else ""
            raise ConfigError(f"--calib-samples {self.calib_samples}: at least 2{none}")
        if self.calib_seqlen < 2:
            raise ConfigError(f"--calib-seqlen {self.calib_seqlen}: at least 2")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size}: at least 1")

    @property
    def may_be_blind(self) -> bool:
        """Whether the command can do without any text."""
        return False


@dataclass(frozen=True)
class Settings(CalibrationSettings):
    """One quantization. dtype: of what stays in 16 bits; samples: whether the report has sample answers."""

    command: str = AWQ
    search: str = "best"
    w_bits: int = 4
    w_group_size: int = 128
    w_sym: bool = False
    quant_dtype: str = "int8"
    dtype: str = "auto"
    samples: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.command == SMOOTH_QUANT:
            if self.quant_dtype not in QUANT_DTYPES:
                raise ConfigError(f"--quant-dtype {self.quant_dtype}: use {', '.join(QUANT_DTYPES)}")
            return
        bits = BITS[self.command]
        if self.w_bits not in bits:
            name = "AWQ" if self.command == AWQ else "GPTQ"
            raise ConfigError(
                f"--w-bits {self.w_bits}: {name} weights are written in {' or '.join(map(str, bits))} bits"
            )
        if self.w_group_size not in GROUP_SIZES:
            raise ConfigError(f"--w-group-size {self.w_group_size}: use 32, 64 or 128")

    @property
    def may_be_blind(self) -> bool:
        return True
