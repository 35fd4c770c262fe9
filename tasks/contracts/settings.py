"""Where a run happens. Settings come from the environment and never change a number."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tasks.contracts.spec import Runtime


class Settings(BaseSettings):
    """Read from REQUANT_* environment variables; the defaults need no set-up at all."""

    model_config = SettingsConfigDict(env_prefix="REQUANT_", frozen=True)

    store: str = Field(".requant/store", description="Folder that holds artifacts and run records.")
    scratch: Path = Field(
        Path(".requant/scratch"), description="Folder for decoded images and training checkpoints; may be deleted."
    )
    cache_gib: float = Field(
        50.0,
        gt=0,
        description="Most room in scratch for data and weights from S3, and as much again for decoded images; what was "
        "used last stays.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where PyTorch runs; auto takes CUDA if it can.")
    redo: bool = Field(False, description="Compute every step again, whatever the store holds of it.")
    build_on: dict[Runtime, str] = Field(
        {}, description="Deployments that build and measure engines elsewhere, as JSON by runtime; here if not named."
    )
    train_on: str | None = Field(None, description="Deployment that trains (QAT) elsewhere, such as train/gpu.")
    torchrun: str = Field(
        "", description="Options of torchrun, to train by several processes: --standalone --nproc-per-node=2."
    )
    worker_minutes: float = Field(240.0, gt=0, description="Longest wait for such a deployment, its queue included.")
    gpu: int | None = Field(None, ge=0, description="Index of the GPU to use; any that is free if not given.")
    gpu_wait_minutes: float = Field(60.0, ge=0, description="Longest wait for a GPU that another run has.")
    gpu_free_mib: int = Field(1024, ge=0, description="Least free memory of that GPU to start a build with.")
    build_limit_minutes: float = Field(60.0, gt=0, description="A TensorRT build that takes longer is killed.")
    signing_key: Path | None = Field(None, description="PEM file of the private key that signs releases.")
    trusted_keys: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="PEM files of public keys, joined by : as in PATH; a release signed by no other is used."
    )
    report_url: str | None = Field(
        None,
        pattern=r"^https?://[^/@\s]+(/\S*)?$",
        description="Where browsers find what is in the store, so that Prefect's UI can link to reports.",
    )
    alarm_url: SecretStr | None = Field(
        None,
        description="Address of the fleet's alarm block, such as a Slack webhook; `requant deploy` keeps it there.",
    )

    @field_validator("trusted_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value


class S3Settings(BaseSettings):
    """How a store in S3 is reached, from REQUANT_S3_*. Credentials are those that boto3 finds by itself.

    What is not set here is also left to boto3: AWS_ENDPOINT_URL_S3, AWS_REGION, profiles, AWS_CA_BUNDLE.
    """

    model_config = SettingsConfigDict(env_prefix="REQUANT_S3_", frozen=True)

    endpoint: str | None = Field(
        None, pattern=r"^https?://[^/@\s]+/?$", description="The server's URL, http:// or https://; for AWS not needed."
    )
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="Bucket in the path or in the host name. Most servers of one's own need path."
    )
    encryption: Literal["AES256", "aws:kms"] | None = Field(None, description="What the server encrypts objects with.")
    kms_key: str | None = Field(None, description="The key for aws:kms; the bucket's own if not given.")
    connect_timeout_s: float = Field(10.0, gt=0)
    read_timeout_s: float = Field(60.0, gt=0, description="How long the server may be silent.")
    retry_mode: Literal["standard", "adaptive"] = Field(
        "standard", description="adaptive also slows down when asked to."
    )
    max_attempts: int = Field(5, ge=1, le=20, description="Of each request; the first one counts.")
    concurrency: int = Field(4, ge=1, le=64, description="Requests at once for one file; each takes some 20 MiB.")

    @model_validator(mode="after")
    def _key_has_use(self) -> Self:
        if self.kms_key and self.encryption != "aws:kms":
            raise ValueError("REQUANT_S3_KMS_KEY needs REQUANT_S3_ENCRYPTION=aws:kms")
        return self
