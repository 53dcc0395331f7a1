# The images of both programs: `docker build --target api .` and `--target relay`. They have
# the program and the certificates of authorities, and nothing else: no shell, no libraries,
# no package manager. Two builds of a commit have the same programs, bit by bit.
FROM --platform=$BUILDPLATFORM golang:1.26-bookworm AS build
WORKDIR /src
# The modules have their own layer. Docker downloads them again only if go.mod or go.sum
# changes.
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
# Another folder compiles everything again.
ARG GOCACHE=/root/.cache/go-build
ARG TARGETOS
ARG TARGETARCH
RUN --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -buildvcs=false \
      -ldflags "-s -w -X main.version=${VERSION}" -o /out/ ./cmd/api ./cmd/relay

FROM scratch AS base
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
ENV PATH=/
# A numeric user, so that Kubernetes can verify that it is not root.
USER 65532:65532
ARG VERSION=dev
ARG REVISION
LABEL org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${REVISION} \
      org.opencontainers.image.source=https://github.com/diehard-outbox/diehard \
      org.opencontainers.image.documentation=https://github.com/diehard-outbox/diehard/tree/main/docs \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.vendor="The authors of Diehard"

FROM base AS api
COPY --from=build /out/api /api
LABEL org.opencontainers.image.title="Diehard API" \
      org.opencontainers.image.description="Creates users, and writes an event into the outbox in the same transaction"
ENV DIEHARD_HTTP_ADDR=:8080 \
    DIEHARD_ADMIN_ADDR=:9090
EXPOSE 8080 9090
HEALTHCHECK --interval=5s --timeout=5s --retries=6 CMD ["/api", "health"]
ENTRYPOINT ["/api"]

FROM base AS relay
COPY --from=build /out/relay /relay
LABEL org.opencontainers.image.title="Diehard relay" \
      org.opencontainers.image.description="Delivers events from the outbox in PostgreSQL to ClickHouse, exactly once"
ENV DIEHARD_ADMIN_ADDR=:9091
EXPOSE 9091
HEALTHCHECK --interval=5s --timeout=5s --retries=6 CMD ["/relay", "health"]
ENTRYPOINT ["/relay"]
