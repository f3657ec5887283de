"""Check the environment variables by which a launcher describes the processes of a run."""

import errno
import os
import socket
from collections.abc import Mapping

from dpo_dist.errors import ConfigError
from dpo_dist.number_text import counted

_SIZES = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}
_LAST_PORT = 65535
_LAUNCH = "start with accelerate launch or torchrun, which set them, or unset all of them for one process"
_WITHOUT_EFFECT = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "choose parallelism=zero3, zero2 or ddp; remove "
    "deepspeed_config_file from the launcher's configuration",
    "ACCELERATE_USE_FSDP": "choose parallelism=zero3; launch with a file of launch/accelerate",
    "ACCELERATE_DYNAMO_BACKEND": "set model.compile=true, and remove dynamo_config from the "
    "launcher's configuration",
}
"""Variables of accelerate that would be ignored, and what to set in their place."""
_OFF = ("", "0", "false", "no", "none")


def check_launch(environ: Mapping[str, str], repeated: Mapping[str, tuple[str, str]]) -> None:
    """Check that the variables of a launcher describe one process of a world, and that none is ignored.

    Args:
        environ: the environment.
        repeated: variables of accelerate that may repeat a setting of the run, each with this setting, such
            as "parallelism.kind=zero3", and with the value of the variable that says the same.

    Raises:
        ConfigError: they do not, or rank 0 cannot use its port.
    """
    _check_accelerate(environ, repeated)
    numbers = {name: _number(name, environ) for name in (*_SIZES, *_SIZES.values()) if name in environ}
    size = numbers.get("WORLD_SIZE", 1)
    if "RANK" not in numbers and size > 1:
        raise _error("WORLD_SIZE is set without RANK", f"WORLD_SIZE={size}")
    if "RANK" in numbers and "WORLD_SIZE" not in numbers:
        raise _error("RANK is set without WORLD_SIZE", f"RANK={numbers['RANK']}")
    for rank, world in _SIZES.items():
        if rank in numbers and world in numbers and numbers[rank] >= numbers[world]:
            error = _error(
                f"{rank} is not below {world}",
                f"{rank}={numbers[rank]}, {world}={numbers[world]}",
                f"{rank} from 0 to {world} - 1",
            )
            error.reporting_rank = this_rank()  # rank 0 does not have it
            raise error
    if size > 1:
        _check_address(environ)


def check_groups(processes: int, ranks: int) -> None:
    """Check that processes can be divided into groups of `ranks` that share the tokens of a micro-batch.

    Raises:
        ConfigError: their number is no multiple of `ranks`.
    """
    if processes % ranks:
        key = "parallelism.sequence_parallel"
        raise ConfigError(
            "the processes cannot be divided into groups of this size",
            where=key,
            got=f"{ranks}, with {counted(processes, 'process', 'processes')}",
            expected=f"a divisor of {processes}",
            remedy=f"set {key} to one, or start a multiple of {ranks} processes",
        )


def _number(name: str, environ: Mapping[str, str]) -> int:
    text, least = environ[name], int(name in _SIZES.values())
    if not text.isdecimal() or int(text) < least:
        raise _error(
            f"{name} is not the number of a process", f"{name}={text}", f"a whole number from {least}"
        )
    return int(text)


def _check_address(environ: Mapping[str, str]) -> None:
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise _error(f"{' and '.join(missing)} must be set for several processes", "no value")
    port = environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) <= _LAST_PORT:
        raise _error("MASTER_PORT is not a port", f"MASTER_PORT={port}", f"a number from 1 to {_LAST_PORT}")
    # torchrun and accelerate open the port in the launcher.
    if environ["RANK"] == "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_free(int(port))


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                return
            raise ConfigError(
                "the port of rank 0 cannot be opened",
                where="environment: MASTER_PORT",
                got=f"{port}: {error.strerror}",
                expected="a port that no other program uses, the same on every rank",
                remedy="set another MASTER_PORT, or let the launcher choose one: --main_process_port 0",
            ) from None


def _check_accelerate(environ: Mapping[str, str], repeated: Mapping[str, tuple[str, str]]) -> None:
    for name, remedy in _WITHOUT_EFFECT.items():
        if environ.get(name, "").lower() not in _OFF:
            raise _ignored(f"{name}={environ[name]}", remedy)
    for name, (setting, value) in repeated.items():
        given = environ.get(name, "").lower()
        if given not in (*_OFF, "auto") and not _is_same(given, value):
            key = setting.partition("=")[0]
            raise _ignored(
                f"{name}={given} with {setting}",
                f"set {key}, and remove this option from the launcher's file",
            )


def _is_same(given: str, value: str) -> bool:
    """Return whether two values are equal as texts or as numbers."""
    try:
        return given == value or float(given) == float(value)
    except ValueError:
        return False


def _ignored(got: str, remedy: str) -> ConfigError:
    return ConfigError(
        "an option of the launcher would have no effect",
        where="environment: accelerate launch",
        got=got,
        expected="a launcher that only starts processes, as with the files of launch/accelerate",
        remedy=remedy,
    )


def _error(message: str, got: str, expected: str = "") -> ConfigError:
    return ConfigError(message, where="environment", got=got, expected=expected, remedy=_LAUNCH)


def this_rank() -> int:
    """Return RANK; 0 if it is not set or not a number."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0
