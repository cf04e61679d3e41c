# An agent: drafts with the small model, which is the only one here. The console is made from it too.
# The tag names Python's minor version and Debian's release; pin a digest of your own registry by PYTHON_IMAGE=...@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CONSTRAINT=/src/constraints.txt
RUN python -m venv --without-pip /opt/fedhlm
# Libraries first: they change seldom, and what is ours is a layer of its own. What tokenizers downloads models with is not
# for an image that carries its model.
COPY pyproject.toml constraints.txt deploy/docker/locks/agent.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedhlm/bin/python install --require-hashes --only-binary :all: --requirement agent.txt \
    && pip --python /opt/fedhlm/bin/python uninstall --yes huggingface_hub hf-xet \
    && find /opt/fedhlm/lib -depth -type d \( -name tests -o -name test \) -exec rm -r {} +
COPY README.md LICENSE ./
COPY fedhlm fedhlm
COPY edge_agent edge_agent
COPY fedhlm_doors fedhlm_doors
COPY fedhlm_fleet fedhlm_fleet
COPY fedhlm_traces fedhlm_traces
COPY fedhlm_zoo/__init__.py fedhlm_zoo/shipped.py fedhlm_zoo/
COPY fedhlm_zoo/artefacts/slm fedhlm_zoo/artefacts/slm
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedhlm/bin/python install --no-deps --prefix /opt/code . \
    && find /opt/code -path '*/bin/*' -type f -exec sed -i '1s|^#!.*|#!/opt/fedhlm/bin/python|' {} +

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/fedhlm /opt/fedhlm
COPY --from=build /opt/code /opt/fedhlm
ENV PATH=/opt/fedhlm/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Nothing in here speaks to anyone but the broker, whatever imports the libraries.
ENV ORT_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_OFFLINE=1
# The engine gives a new volume the owner of the folder that it covers.
RUN install -d -o 10001 -g 10001 -m 0700 /var/lib/fedhlm /run/fedhlm
USER 10001:10001
ENTRYPOINT ["python", "-m", "fedhlm_fleet.container.part"]
CMD ["agent"]
