#!/usr/bin/env bash
# Builds kube-apiserver, kube-controller-manager and kube-scheduler 1.20.2 from Debian bookworm's source package, beside
# Debian's etcd, for `make test-kubernetes`. Nothing is installed on the system; what remains is 250 MB of programs.
#
#   tools/build_kubernetes.sh [DIRECTORY]      default: ~/.cache/chiron/kubernetes-1.20
#
# Takes five minutes on two idle cores and 3 GB of disk while it runs. Needs apt, dpkg-dev, make, a C library; x86-64 or
# arm64. DEBIAN_MIRROR names another archive.
set -euo pipefail
target=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/chiron/kubernetes-1.20}
[ -x "$target/etcd" ] && { echo "$target is complete"; exit 0; }
mkdir -p "$target"
exec 9> "$target.lock"
flock 9
[ -x "$target/etcd" ] && { echo "$target is complete"; exit 0; }

work=$(mktemp -d "${TMPDIR:-/tmp}/chiron-kubernetes.XXXXXX")
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
mkdir -p "$work"/{apt/src,apt/lists/partial,apt/cache/archives/partial,debs,go,reflect2,rsync,etcd,src,home}
cat > "$work/apt/src/debian.sources" <<SOURCES
Types: deb deb-src
URIs: ${DEBIAN_MIRROR:-http://deb.debian.org/debian}
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
cat > "$work/apt/apt.conf" <<CONF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$work/apt/src";
Dir::State::lists "$work/apt/lists";
Dir::Cache "$work/apt/cache";
CONF
export APT_CONFIG=$work/apt/apt.conf
apt-get -q update
cd "$work/debs"
apt-get -q download golang-1.19-go golang-1.19-src etcd-server golang-github-modern-go-reflect2-dev rsync libpopt0
for each in golang-1.19-go:go golang-1.19-src:go etcd-server:etcd golang-github-modern-go-reflect2-dev:reflect2 rsync:rsync libpopt0:rsync; do
  dpkg-deb -x "${each%:*}"_*.deb "$work/${each#*:}"
done

cd "$work/src"
apt-get -q source --download-only "kubernetes=1.20.5+really1.20.2-1.1+deb12u1"
dpkg-source -x ./*.dsc k8s
cd k8s
# The vendored reflect2 1.0.1 crashes with Go 1.18 and later on the first custom resource: Debian's 1.0.2 instead.
vendored=vendor/github.com/modern-go/reflect2
newer=$work/reflect2/usr/share/gocode/src/github.com/modern-go/reflect2
rm -f $vendored/*.go $vendored/*.s
cp "$newer"/*.go "$newer"/*.s $vendored/
rm -f $vendored/*_test.go

# 1.20 does not know the pod deletion cost yet, which every version since 1.22 has: the same comparison, at the same place.
python3 - pkg/controller/controller_utils.go <<'BACKPORT'
import sys
path = sys.argv[1]
text = open(path).read()
mark = "\t// 4. Doubled up < not doubled up\n"
assert text.count(mark) == 1
text = text.replace(mark, """\tif left, right := podDeletionCost(s.Pods[i]), podDeletionCost(s.Pods[j]); left != right {
\t\treturn left < right
\t}
""" + mark)
text += """
// podDeletionCost is what Kubernetes has had since 1.22.
func podDeletionCost(pod *v1.Pod) int32 {
\tvar cost int32
\tfmt.Sscanf(pod.Annotations["controller.kubernetes.io/pod-deletion-cost"], "%d", &cost)
\treturn cost
}
"""
open(path, "w").write(text)
BACKPORT

export GOROOT=$work/go/usr/lib/go-1.19 CGO_ENABLED=0 GOPATH=$PWD/.go HOME=$work/home GO111MODULE=auto GOFLAGS=-p=2
export PATH=$GOROOT/bin:$work/rsync/usr/bin:$PATH
export LD_LIBRARY_PATH=$(find "$work/rsync" -name 'lib*-linux-gnu' -type d | paste -sd:)
export KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=clean KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20
mkdir -p .go/src/k8s.io
ln -s ../../.. .go/src/k8s.io/kubernetes
cd .go/src/k8s.io/kubernetes
make WHAT="cmd/kube-apiserver cmd/kube-controller-manager cmd/kube-scheduler"
cp -L _output/bin/kube-{apiserver,controller-manager,scheduler} "$target/"
# Last: its presence says that the directory is complete.
cp -L "$work/etcd/usr/bin/etcd" "$target/etcd.part"
mv "$target/etcd.part" "$target/etcd"
echo "$target is complete"
