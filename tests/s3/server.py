"""A real S3 protocol server on loopback, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Self

import boto3
from botocore.config import Config

_SERVE = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until who started it ends
server.stop()
"""


class Server:
    """moto's S3, used as a context manager."""

    def __enter__(self) -> Self:
        """Start it at a free port."""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE], stdin=pipe, stdout=pipe, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():
                self.port = int(line)
                break
        return self

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def make_bucket(self, name: str) -> None:
        """A new bucket."""
        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 2}),
        )
        client.create_bucket(Bucket=name)
        client.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
