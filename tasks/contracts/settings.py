"""Where a run happens. Settings come from the environment and never change a number."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Read from REQUANT_* environment variables; the defaults need no set-up at all."""

    model_config = SettingsConfigDict(env_prefix="REQUANT_", frozen=True)

    store: str = Field(".requant/store", description="Folder that holds artifacts and run records.")
    scratch: Path = Field(
        Path(".requant/scratch"), description="Folder for decoded images and training checkpoints; may be deleted."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where PyTorch runs; auto takes CUDA if it can.")
