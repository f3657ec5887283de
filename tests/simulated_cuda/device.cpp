// A CUDA device in host memory, for a CPU build of torch.
//
// Tensors with the dispatch key CUDA live in ordinary memory, and every operator runs its CPU kernel on aliases of
// them. What a GPU would refuse is refused (tensors of two devices, more bytes than it has); what would make the host
// wait for it is reported; and bytes are counted as CUDA's caching allocator counts them. Nothing is asynchronous, so
// races between streams stay hidden. device.py answers what torch.cuda asks.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/mm.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;
using c10::Stream;

thread_local DeviceIndex current_device = 0;
thread_local c10::StreamId current_stream = 0;

// ---- waits of the host

using WaitListener = void (*)(const char* kind);
WaitListener wait_listener = nullptr;
int sync_mode = 0;  // of torch.cuda.set_sync_debug_mode: 1 "warn", 2 "error"

// `is_checked`: CUDA's debug mode sees this kind of wait.
void host_waits(const std::string& kind, bool is_checked = true) {
  if (wait_listener != nullptr) wait_listener(kind.c_str());
  TORCH_CHECK(!is_checked || sync_mode < 2, "called a synchronizing CUDA operation: ", kind);
  if (is_checked && sync_mode == 1) TORCH_WARN("called a synchronizing CUDA operation");
}

// ---- memory

std::atomic<int64_t> allocated{0}, peak{0}, limit{INT64_MAX};

// The library is loaded after torch, so its static objects would be destroyed before the last tensors: none is.
std::mutex& pinned_mutex = *new std::mutex;
std::map<const char*, size_t>& pinned_blocks = *new std::map<const char*, size_t>;

size_t rounded(size_t bytes) { return (bytes + 511) / 512 * 512; }  // the smallest block of CUDA's allocator

struct Block {
  void* data;
  int64_t bytes;
  ~Block() {
    allocated -= bytes;
    free(data);
  }
};

void register_pinned(const void* data, size_t bytes) {  // cudaHostRegister, cudaHostUnregister
  std::lock_guard lock(pinned_mutex);
  if (bytes > 0)
    pinned_blocks[static_cast<const char*>(data)] = bytes;
  else
    pinned_blocks.erase(static_cast<const char*>(data));
}

bool is_pinned(const void* data) {
  std::lock_guard lock(pinned_mutex);
  auto after = pinned_blocks.upper_bound(static_cast<const char*>(data));
  if (after == pinned_blocks.begin()) return false;
  auto block = std::prev(after);
  return static_cast<const char*>(data) < block->first + block->second;
}

// torch.accelerator casts the allocators of a device to these two classes without a check.
struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    const Device device(DeviceType::CUDA, current_device);
    if (bytes == 0) return {nullptr, device};
    const auto size = static_cast<int64_t>(rounded(bytes));
    const int64_t after = allocated += size;
    if (after > limit) {
      allocated -= size;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes; ",
                       after - size, " of ", limit.load(), " are allocated (simulated device)");
    }
    for (int64_t seen = peak; after > seen && !peak.compare_exchange_weak(seen, after);) {
    }
    auto* block = new Block{aligned_alloc(512, size), size};
    return {block->data, block, [](void* context) { delete static_cast<Block*>(context); }, device};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override { return {}; }  // device.py has them
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex) override { peak = allocated.load(); }
};
DeviceMemory& device_memory = *new DeviceMemory;

struct PinnedMemory final : at::HostAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    const Device host(DeviceType::CPU);
    if (bytes == 0) return {nullptr, host};
    void* data = aligned_alloc(512, rounded(bytes));
    register_pinned(data, bytes);
    return {data, data, raw_deleter(), host};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* data) {
      register_pinned(data, 0);
      free(data);
    };
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
  bool record_event(void*, void*, Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
PinnedMemory& pinned_memory = *new PinnedMemory;

// ---- devices, streams, events

// Read again at each call: processes that are forked from one parent have their own devices, as long as their parent
// has not used CUDA.
DeviceIndex device_count() {
  const char* wanted = getenv("SIMULATED_CUDA_DEVICES");
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  const int there = wanted == nullptr ? 1 : atoi(wanted);
  if (visible == nullptr) return there;
  if (*visible == '\0' || *visible == '-') return 0;
  const std::string names(visible);
  return std::min<int>(there, 1 + std::count(names.begin(), names.end(), ','));
}

using Clock = std::chrono::steady_clock;
using Event = Clock::time_point;  // of the host, which never runs ahead of this device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return {DeviceType::CUDA, current_device}; }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  Stream stream(c10::StreamId id) const { return Stream(Stream::UNSAFE, getDevice(), id); }
  Stream getStream(Device) const override { return stream(current_stream); }
  Stream getDefaultStream(Device) const override { return stream(0); }
  Stream getNewStream(Device, int) const override {
    static std::atomic<c10::StreamId> last{0};
    return stream(++last);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream entered) const override {
    return stream(std::exchange(current_stream, entered.id()));
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { host_waits("stream"); }
  void synchronizeDevice(DeviceIndex) const override { host_waits("device"); }
  void record(void** event, const Stream&, DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    *static_cast<Event*>(*event) = Clock::now();
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { host_waits("event"); }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
};

// Random numbers of the device are those of a CPU generator of its own.
struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  explicit DeviceGenerator(DeviceIndex index)
      : GeneratorImpl(Device(DeviceType::CUDA, index), c10::DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(device().index());
    copy->inner = inner.clone();
    return copy;
  }
};
std::vector<at::Generator>& default_generators = *new std::vector<at::Generator>;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasCUDA() const override { return device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex deviceCount() const override { return device_count(); }
  int getNumGPUs() const override { return device_count(); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generators.at(index < 0 ? ::current_device : index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? ::current_device : index);
  }
};

// ---- tensors

Tensor over(c10::Storage storage, DispatchKey key, const Tensor& layout) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), layout.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(layout.sizes(), layout.strides(), layout.storage_offset());
  tensor._set_conj(layout.is_conj());
  tensor._set_neg(layout.is_neg());
  return tensor;
}

// A CPU tensor over the memory of a device tensor. It keeps this memory, as gloo may work on it after its call.
Tensor on_host(const Tensor& tensor) {
  auto* owner = new c10::Storage(tensor.storage());
  c10::DataPtr data(owner->mutable_data(), owner, [](void* kept) { delete static_cast<c10::Storage*>(kept); },
                    Device(DeviceType::CPU));
  const auto bytes = owner->nbytes();
  return over(c10::Storage({}, bytes, std::move(data), c10::GetCPUAllocator(), true), DispatchKey::CPU, tensor);
}

const c10::DispatchKeySet cuda_keys(DispatchKey::CUDA);
using Sizes = at::IntArrayRef;
using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using On = std::optional<Device>;
using Pinned = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

Tensor empty(Sizes sizes, Dtype dtype, Layout, On device, Pinned, Format format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(sizes, &device_memory, cuda_keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Sizes sizes, Sizes strides, Dtype dtype, Layout, On device, Pinned) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(sizes, strides, &device_memory, cuda_keys, c10::dtype_or_default(dtype));
}

Tensor copied_to_device(const Tensor& host) {
  Tensor tensor = empty_strided(host.sizes(), host.strides(), host.scalar_type(), {}, {}, {});
  if (host.numel() > 0) on_host(tensor).copy_(host);
  return tensor;
}

// A kernel has resized `alias`, and `tensor` follows it.
void follow(const Tensor& tensor, const Tensor& alias) {
  if (alias.storage().data() != tensor.storage().data()) {
    auto data = device_memory.allocate(alias.storage().nbytes());
    memcpy(data.get(), alias.storage().data(), alias.storage().nbytes());
    tensor.storage().set_data_ptr_noswap(std::move(data));
    tensor.storage().set_nbytes(alias.storage().nbytes());
  }
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
}

// Applies `change` to every tensor of an argument or a result, also in lists and lists of lists.
template <class Change>
IValue with_each_tensor(const IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (!value.isList() || value.isIntList() || value.isDoubleList() || value.isBoolList()) return value;
  c10::impl::GenericList changed(value.toList().elementType());
  for (const IValue& item : value.toListRef()) changed.push_back(with_each_tensor(item, change));
  return changed;
}

// ---- operators

// Their results have sizes, or are values, that only the device knows.
const auto& waiting = *new std::set<std::string>{
    "aten::_local_scalar_dense", "aten::bincount", "aten::equal",      "aten::is_nonzero", "aten::masked_select",
    "aten::nonzero",             "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"};
// They take their indices from the CPU too.
const auto& indexing =
    *new std::set<std::string>{"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

// A mask as an index becomes indices by `nonzero`, here within the CPU's kernel.
bool waits_for_mask(const std::string& name, at::ArrayRef<IValue> arguments) {
  if (name != "aten::_index_put_impl_") return false;
  for (const IValue& index : arguments[1].toListRef())
    if (index.isTensor() && index.toTensor().scalar_type() == at::kBool) return true;
  return false;
}

void report_wait(const std::string& name, at::ArrayRef<IValue> arguments) {
  const bool counts = name == "aten::repeat_interleave" && arguments.back().isNone();  // no output_size
  const bool loops = name == "aten::_grouped_mm" && arguments[0].toTensor().scalar_type() != at::kBFloat16;
  if (waiting.count(name) > 0 || counts || loops || waits_for_mask(name, arguments)) host_waits(name);
}

// Squares of 8192 only measure the device's peak. Their random numbers and products would take a CPU a minute, and
// nobody reads them: they stay as they are.
bool only_measures(const std::string& name, at::ArrayRef<IValue> arguments) {
  return (name == "aten::normal_" || name == "aten::mm") && arguments[0].toTensor().numel() >= 1 << 26;
}

const char* const mixed =
    "Expected all tensors to be on the same device, but found at least two devices, cuda and cpu! (when running ";

const auto& optional_generator = *new c10::TypePtr(c10::OptionalType::create(c10::GeneratorType::get()));

// Any operator: its CPU kernel on aliases of its arguments.
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  report_wait(schema.name(), arguments);
  if (only_measures(schema.name(), arguments)) {
    const IValue result = schema.name() == "aten::mm" ? arguments.back() : arguments.front();  // out, or self
    torch::jit::drop(*stack, arguments.size());
    stack->push_back(result);
    return;
  }

  std::vector<std::pair<Tensor, Tensor>> aliased;  // a device tensor and its alias
  bool takes_host = false;
  const auto alias = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined() || !tensor.is_cuda()) {
      takes_host |= tensor.defined() && tensor.is_cpu() && tensor.dim() > 0;
      return tensor;
    }
    aliased.emplace_back(tensor, on_host(tensor));
    return aliased.back().second;
  };
  const auto first = stack->size() - arguments.size();
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    IValue& value = (*stack)[first + i];
    value = with_each_tensor(value, alias);
    if (value.isDevice()) value = Device(DeviceType::CPU);
    const bool is_generator = schema.arguments()[i].type()->isSubtypeOf(*optional_generator);
    if (is_generator && (value.isNone() || value.toGenerator().device().is_cuda())) {
      const auto generator = value.isNone() ? default_generators.at(current_device) : value.toGenerator();
      value = static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
    }
  }
  TORCH_CHECK(!takes_host || aliased.empty() || indexing.count(schema.name()) > 0, mixed, schema.name(), ")");
  // Indices of an assignment are copied to the device; those of a selection reach its kernel as copies.
  if (takes_host && schema.name() == "aten::_index_put_impl_") host_waits("copy to device, pageable");

  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);

  c10::OptionalDeviceGuard guard;
  if (!aliased.empty()) guard.reset_device(aliased.front().first.device());
  const auto on_device = [&](const Tensor& result) -> Tensor {
    if (!result.defined() || !result.is_cpu()) return result;
    for (const auto& [tensor, alias] : aliased) {
      if (!alias.is_same(result)) continue;
      follow(tensor, alias);
      return tensor;
    }
    for (const auto& [tensor, alias] : aliased)
      if (result.storage().is_alias_of(alias.storage())) return over(tensor.storage(), DispatchKey::CUDA, result);
    return copied_to_device(result);
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++)
    (*stack)[i] = with_each_tensor((*stack)[i], on_device);
}

// A collective call of device tensors. Its group has a backend for CUDA (gloo, called NCCL), which here gets aliases on
// the CPU. So the group need not have a backend for the CPU, and CPU tensors given to it fail as with NCCL.
void communicate_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto place = schema.argumentIndexWithName("process_group").value();
  IValue& argument = (*stack)[stack->size() - schema.arguments().size() + place];
  const auto group = argument.toCustomClass<c10d::ProcessGroup>();
  const auto inner = c10::make_intrusive<c10d::ProcessGroup>(group->getRank(), group->getSize());
  inner->setBackend(DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, group->getBackend(DeviceType::CUDA));
  argument = inner;
  run_on_host(op, stack);
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.is_cuda() != source.is_cuda() && self.numel() > 0) {
    const Tensor& host = self.is_cuda() ? source : self;
    // From memory with gaps CUDA first gathers the elements, in pageable memory.
    const bool pinned = is_pinned(host.storage().data()) && host.is_non_overlapping_and_dense();
    const std::string kind = self.is_cuda() ? "copy to device" : "copy to host";
    // One without non_blocking waits, of pinned memory too. One with it waits for pageable memory, which CUDA's debug
    // mode does not see.
    if (!non_blocking || !pinned) host_waits(kind + (pinned ? "" : ", pageable"), !non_blocking);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  (self.is_cuda() ? on_host(self) : self).copy_(source.is_cuda() ? on_host(source) : source);
  return self;
}

// Products with an output type of their own exist on CUDA only.
void check_product(const Tensor& left, const Tensor& right, at::ScalarType dtype) {
  TORCH_CHECK(left.is_cuda() && right.is_cuda(), mixed, "aten::mm)");
  TORCH_CHECK(dtype == left.scalar_type() || (dtype == at::kFloat && at::isReducedFloatingType(left.scalar_type())),
              "out_dtype must be that of the input, or float32 for 16-bit inputs");
}

Tensor mm_of_dtype(const Tensor& left, const Tensor& right, at::ScalarType dtype) {
  check_product(left, right, dtype);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return copied_to_device(at::mm(on_host(left).to(dtype), on_host(right).to(dtype)));
}

Tensor& addmm_of_dtype(const Tensor& added, const Tensor& left, const Tensor& right, at::ScalarType dtype,
                       const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  check_product(left, right, dtype);
  TORCH_CHECK(added.is_cuda() && out.is_cuda(), mixed, "aten::addmm)");
  TORCH_CHECK(added.scalar_type() == dtype && out.scalar_type() == dtype, "the sum must have out_dtype");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Tensor alias = on_host(out);
  at::addmm_out(alias, on_host(added), on_host(left).to(dtype), on_host(right).to(dtype), beta, alpha);
  return out;
}

// Of integers it exists on CUDA only.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  if (least.equal(most.toDouble())) host_waits("aten::histc");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return copied_to_device(at::histc(on_host(self).to(at::kFloat), bins, least, most).to(self.scalar_type()));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("histc", histc);
  m.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());  // not that of any device
  m.impl("mm.dtype", mm_of_dtype);
  m.impl("addmm.dtype_out", addmm_of_dtype);
  m.impl("record_stream", [](Tensor&, at::Stream) {});  // memory is freed when no work is queued
}

// A CPU build has kernels of these for CUDA, which would end in gloo; it would warn that they are replaced.
struct : c10::WarningHandler {
  void process(const c10::Warning&) override {}
} no_warnings;

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  c10::WarningUtils::WarningHandlerGuard guard(&no_warnings);
  for (const auto* name :
       {"broadcast_", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_", "allgather_coalesced_",
        "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "alltoall_", "alltoall_base_", "barrier",
        "send", "recv_", "recv_any_source_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&communicate_on_host>());
}

// For kernels in Python (device.py): tensors of the one kind as the other, which a real kernel would not copy.
TORCH_LIBRARY(simulated_cuda, m) {
  m.def("on_host(Tensor tensor) -> Tensor", on_host);
  m.def("on_device(Tensor tensor) -> Tensor", copied_to_device);
  m.def("set_default_generator(Generator? generator) -> ()",
        [](const at::Generator& generator) {
          const size_t index = generator.device().index();
          default_generators.resize(std::max(default_generators.size(), index + 1));
          default_generators[index] = generator;
        });
}

[[maybe_unused]] const bool allocators_are_set = [] {
  c10::SetAllocator(DeviceType::CUDA, &device_memory, 1);
  at::setHostAllocator(DeviceType::CUDA, &pinned_memory, 1);
  return true;
}();

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, ::Guard)
}
namespace at {
using ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}  // namespace at

extern "C" {
void simulated_listen(WaitListener listener) { wait_listener = listener; }
void simulated_wait(const char* kind) { host_waits(kind); }
void simulated_set_sync_mode(int mode) { sync_mode = mode; }
int simulated_register(const void* data, size_t bytes) {
  register_pinned(data, bytes);
  return 0;
}
void simulated_set_limit(int64_t bytes) { limit = bytes; }
int64_t simulated_allocated() { return allocated; }
int64_t simulated_peak() { return peak; }
void simulated_reset_peak() { peak = allocated.load(); }
int simulated_device_count() { return device_count(); }
int simulated_exchange_device(int index) {
  return index < 0 ? current_device : std::exchange(current_device, static_cast<DeviceIndex>(index));
}
double simulated_milliseconds(const Event* begin, const Event* end) {
  return std::chrono::duration<double, std::milli>(*end - *begin).count();
}
int64_t simulated_exchange_stream(int64_t id) { return id < 0 ? current_stream : std::exchange(current_stream, id); }
}
