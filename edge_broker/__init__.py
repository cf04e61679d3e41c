"""The cluster's part: the edge service, and an embedded MQTT broker for machines without one."""
