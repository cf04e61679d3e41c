# Tools: makes certificates and broker configurations, and asks agents as a client. No model, no part.
# The tag names Python's minor version and Debian's release; pin a digest of your own registry by PYTHON_IMAGE=...@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CONSTRAINT=/src/constraints.txt
RUN python -m venv --without-pip /opt/fedhlm
# Libraries first: they change seldom, and what is ours is a layer of its own.
COPY pyproject.toml constraints.txt deploy/docker/locks/init.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedhlm/bin/python install --require-hashes --only-binary :all: --requirement init.txt \
    && find /opt/fedhlm/lib -depth -type d \( -name tests -o -name test \) -exec rm -r {} +
COPY README.md LICENSE ./
COPY fedhlm fedhlm
COPY fedhlm_fleet fedhlm_fleet
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedhlm/bin/python install --no-deps --prefix /opt/code . \
    && find /opt/code -path '*/bin/*' -type f -exec sed -i '1s|^#!.*|#!/opt/fedhlm/bin/python|' {} +

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/fedhlm /opt/fedhlm
COPY --from=build /opt/code /opt/fedhlm
ENV PATH=/opt/fedhlm/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["fedhlm_fleet.container.init"]
