"""FedHLM's threshold federation as a Flower app, in Flower's simulation, on observations from `beside.py`.

It runs in an environment of its own: `pip install -r benchmarks/flower/requirements.txt`, then
`python benchmarks/flower/peer.py OBSERVATIONS OUT`. The rule is in `published.py`; Flower does the rounds.
"""

import json
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

sys.path.insert(0, str(Path(__file__).parent))
from published import Rule, Sent, client_round, read, server_round

OBSERVATIONS = Path(sys.argv[1]).resolve()


def tau_in(message: Message) -> float:
    """The threshold that a message carries."""
    return float(message.content["arrays"].to_numpy_ndarrays()[0][0])


def arrays_of(tau: float) -> ArrayRecord:
    """A threshold as Flower's model."""
    return ArrayRecord([np.array([tau], np.float64)])


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """A client's round: equation (6) on its own observations."""
    place, number = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]) - 1
    pairs = [tuple(pair) for pair in read(OBSERVATIONS)["rounds"][number][place]]
    sent = client_round(Rule(**read(OBSERVATIONS)["rule"]), pairs, tau_in(message), number)
    metrics = MetricRecord({"num-examples": sent.tokens, "client": place})
    return Message(RecordDict({"arrays": arrays_of(sent.threshold), "metrics": metrics}), reply_to=message)


class Thresholds(FedAvg):
    """Equations (7) and (8) in place of the mean over all clients; notes the threshold, bytes and seconds of rounds."""

    def __init__(self, clients: int, clusters: int, tau: float) -> None:
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.clusters = clusters
        self.tau = tau
        self.thresholds: list[float] = []
        self.costs: list[dict[str, float]] = []
        self._began_s = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every client, and note the bytes."""
        self._began_s = time.perf_counter()
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.costs.append({"messages": len(messages), "down_bytes": sum(map(size_of, messages))})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the thresholds, cluster by cluster."""
        answers = list(replies)
        for answer in answers:
            if answer.has_error():
                raise RuntimeError(f"a client failed in round {server_round}: {answer.error}")
        found = {
            int(answer.content["metrics"]["client"]): Sent(
                tau_in(answer), int(answer.content["metrics"]["num-examples"])
            )
            for answer in answers
        }
        sent = [found[place] for place in range(len(found))]
        self.tau = server_round_of(sent, self.clusters, self.tau)
        self.thresholds.append(self.tau)
        self.costs[-1] |= {
            "messages": self.costs[-1]["messages"] + len(answers),
            "up_bytes": sum(map(size_of, answers)),
            "seconds": time.perf_counter() - self._began_s,
        }
        return arrays_of(self.tau), None


def server_round_of(sent: list[Sent], clusters: int, tau: float) -> float:
    """Equations (7) and (8), where client k is in cluster k modulo their number."""
    return server_round([sent[c::clusters] for c in range(clusters)], tau)


def size_of(message: Message) -> int:
    """The bytes of a message as Flower would send it, without those of gRPC."""
    return int(message_to_proto(message).ByteSize())


def main(out: Path) -> None:
    """Run the simulation and write its trajectory."""
    known = read(OBSERVATIONS)
    clients = len(known["rounds"][0])
    strategy = Thresholds(clients, known["clusters"], known["start"])
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy.start(grid, arrays_of(known["start"]), num_rounds=len(known["rounds"]))

    logging.getLogger("flwr").setLevel(logging.WARNING)
    began_s = time.perf_counter()
    run_simulation(server, client, clients, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    whole_s = time.perf_counter() - began_s
    result = {"thresholds": strategy.thresholds, "costs": strategy.costs, "seconds": whole_s}
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
