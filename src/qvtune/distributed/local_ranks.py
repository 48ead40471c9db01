"""What a launcher tells the ranks that it starts on this host."""

from qvtune.distributed.ports import any_free_port


def rank_variables(num_ranks: int) -> list[dict[str, str]]:
    """Of each rank of a run on this host alone, the environment variables that make it one."""
    number, port = str(num_ranks), str(any_free_port())
    common = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
