# The gateway, in front of engines that run elsewhere, compiled: no engine, no compiler, no pip, and no root.
#
#   docker build -t chiron:0.1.0 .
#   docker run -p 8080:8080 -v ./chiron.toml:/etc/chiron/chiron.toml:ro -v chiron:/var/lib/chiron chiron:0.1.0
#
# Packages are pinned by the lock file that the tests run with. To pin the base as well, give its digest:
# --build-arg PYTHON=python:3.11-slim-bookworm@sha256:...
# tools/try_image.py runs these steps without a container engine.
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends gcc libc6-dev
RUN python3 -m venv /srv/chiron && python3 -m venv /build/tools
COPY requirements-dev.lock pyproject.toml setup.py README.md LICENSE NOTICE ./
RUN /build/tools/bin/python -m pip install --quiet --constraint requirements-dev.lock setuptools mypy
COPY src ./src
RUN CHIRON_COMPILE=1 /build/tools/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels .
RUN /srv/chiron/bin/python -m pip install --quiet --constraint requirements-dev.lock "$(echo wheels/*.whl)[serve,kubernetes,postgres]"
# Without a compiler it would be plain Python.
RUN /srv/chiron/bin/chiron version | grep --fixed-strings "(compiled)"
RUN /srv/chiron/bin/python -m pip uninstall --quiet --yes setuptools pip

FROM ${PYTHON}
COPY --from=build /srv/chiron /srv/chiron
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin chiron && install -d -o 10001 -g 10001 /var/lib/chiron
ENV PATH=/srv/chiron/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /var/lib/chiron
VOLUME /var/lib/chiron
EXPOSE 8080
# Kubernetes has probes of its own. With TLS or another port, give another check.
HEALTHCHECK --start-period=30s CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=3)"]
ENTRYPOINT ["chiron"]
CMD ["serve", "/etc/chiron/chiron.toml", "--data", "/var/lib/chiron", "--host", "0.0.0.0", "--port", "8080"]
