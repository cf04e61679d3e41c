"""A client in paho-mqtt and msgpack, written from docs/protocol.md: python third_party_client.py HOST PORT CLUSTER AGENT TEXT."""

import queue
import sys
import time
import uuid

import msgpack
import paho.mqtt.client as mqtt

host, port, cluster, agent, text = sys.argv[1:]
topic, name = f"fedhlm/1/c/{cluster}/a/{agent}", f"guest-{uuid.uuid4().hex[:8]}"
heard: queue.Queue[list] = queue.Queue()

client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name)
# Tag 1: if this program dies, the broker tells the agent, which stops writing for it.
gone = [1, 3, name, 2, int(time.time() * 1000), "client", False, "third party"]
client.will_set(f"fedhlm/1/client/{name}/status", msgpack.packb(gone), qos=1)
client.on_message = lambda _client, _data, message: heard.put(msgpack.unpackb(message.payload))
client.on_subscribe = lambda *_: client.publish(f"{topic}/from/{name}/prompt", msgpack.packb(prompt), qos=1)
client.on_connect = lambda *_: client.subscribe(f"{topic}/to/{name}/output", qos=1)
# Tag 2, version 3, sender, running number, Unix time in ms; request, text, most tokens, seed, temperature, top_p, stops, preset.
prompt = [2, 3, name, 1, int(time.time() * 1000), name, text, 32, 7, None, None, [], None]
client.connect(host, int(port))
client.loop_start()

pieces: dict[tuple[int, bool], list] = {}  # MQTT may bring a piece twice, or after the next one
position = 0
while True:
    try:
        output = heard.get(timeout=60)
    except queue.Empty:
        sys.exit(f"{agent} has not answered within 60 s")
    request, start, ids, sources, words, finish, error = output[5:12]
    if request == name:
        pieces[start, finish is not None] = output
    while (piece := pieces.pop((position, False), None)) is not None:
        print(piece[9], end="", flush=True)
        position += len(piece[7])
    if (last := pieces.get((position, True))) is not None:
        print(last[9])
        client.loop_stop()
        sys.exit(last[11] or 0)
