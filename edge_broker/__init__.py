"""The edge: serves one cluster, and can run an embedded MQTT broker on machines without one."""
