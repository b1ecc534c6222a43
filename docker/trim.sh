#!/bin/sh
# Take out of a virtual environment what no run needs: headers, test programs, symbols, drivers of devices not used.
set -eu
packages=$(echo "$1"/lib/python3*/site-packages)
cd "$packages"

rm -rf torch/include torch/share torch/test torch/lib/*.a openvino/include
find torch/bin -type f ! -name torch_shm_manager -delete
find torch/lib -name '*.so*' -type f -exec strip --strip-unneeded {} +

# OpenVINO runs on the CPU, from its own format, to which PyTorch's is converted while the image is built
(cd openvino/libs && rm -f cache.json libopenvino_intel_gpu_plugin.so libopenvino_intel_npu_plugin.so)
for frontend in onnx tensorflow tensorflow_lite paddle gguf jax; do
  rm -f openvino/libs/libopenvino_"${frontend}"_frontend.so*
done

for package in matplotlib mpl_toolkits networkx scipy sympy; do
  if [ -d "$package" ]; then
    find "$package" -type d -name tests -prune -exec rm -rf {} +
  fi
done
find . -type d -name __pycache__ -prune -exec rm -rf {} +
