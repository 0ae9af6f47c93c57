// The Python module newllm._C: sweeps as objects made of sizes and addresses, functions that carry them out, and
// what was built. Arguments are trusted; newllm/ops checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "context_sweep_cpu.h"
#ifdef NEWLLM_WITH_CUDA
#include "context_sweep_cuda.h"
#endif

namespace py = pybind11;
using py::literals::operator""_a;

namespace newllm {
namespace {

// The address of an array, or 0 for none.
template <class Value>
struct Address {
    uintptr_t number;

    operator Value*() const { return reinterpret_cast<Value*>(number); }
};

using Reads = Address<const float>;
using Writes = Address<float>;
using Weight = Address<const void>;

}  // namespace
}  // namespace newllm

namespace pybind11::detail {

// An address is an int in Python.
template <class Value>
struct type_caster<newllm::Address<Value>> {
    PYBIND11_TYPE_CASTER(newllm::Address<Value>, const_name("int"));

    bool load(handle source, bool convert) {
        make_caster<uintptr_t> number;
        if (!number.load(source, convert)) return false;
        value.number = cast_op<uintptr_t>(number);
        return true;
    }
};

}  // namespace pybind11::detail

namespace newllm {
namespace {

void define_context(py::module_& module) {
    py::class_<ContextForward>(module, "ContextForward")
        .def(py::init([](const Span& span, int64_t layers, int64_t width, Reads drive, Weight weight,
                         Reads ln_weight, Reads ln_bias, Reads start, Writes outputs, Writes last) {
                 return ContextForward{span,      layers,  width, drive,   weight,
                                       ln_weight, ln_bias, start, outputs, last};
             }),
             py::kw_only(), "span"_a, "layers"_a, "width"_a, "drive"_a, "weight"_a, "ln_weight"_a, "ln_bias"_a,
             "start"_a, "outputs"_a, "last"_a);
    py::class_<ContextAdjoint>(module, "ContextAdjoint")
        .def(py::init([](const Span& span, int64_t layers, int64_t width, Reads outer, Reads slope, Reads normed,
                         Reads rstd, Weight weight, Reads ln_weight, Reads last, Writes total, Writes change,
                         Writes start, Reads slope_product, Reads normed_product) {
                 return ContextAdjoint{span,      layers, width, outer,  slope, normed,        rstd,          weight,
                                       ln_weight, last,   total, change, start, slope_product, normed_product};
             }),
             py::kw_only(), "span"_a, "layers"_a, "width"_a, "outer"_a, "slope"_a, "normed"_a, "rstd"_a,
             "weight"_a, "ln_weight"_a, "last"_a, "total"_a, "change"_a, "start"_a, "slope_product"_a = 0,
             "normed_product"_a = 0);
}

void define_gated(py::module_& module) {
    py::class_<GatedForward>(module, "GatedForward")
        .def(py::init([](const Span& span, int64_t hidden, int64_t width, int64_t deeper, float clamp,
                         Reads drive, Weight weight_c, Weight weight_h, Reads bias_h, Weight weight_gate,
                         Reads bias_gate, Reads ln_weight, Reads ln_bias, Reads start, Writes outputs,
                         Writes last) {
                 return GatedForward{span,   hidden,   width,  deeper,      clamp,     drive,     weight_c, weight_h,
                                     bias_h, weight_gate, bias_gate, ln_weight, ln_bias, start, outputs, last};
             }),
             py::kw_only(), "span"_a, "hidden"_a, "width"_a, "deeper"_a, "clamp"_a, "drive"_a, "weight_c"_a,
             "weight_h"_a, "bias_h"_a, "weight_gate"_a, "bias_gate"_a, "ln_weight"_a, "ln_bias"_a, "start"_a,
             "outputs"_a, "last"_a);
    py::class_<GatedAdjoint>(module, "GatedAdjoint")
        .def(py::init([](const Span& span, int64_t hidden, int64_t width, int64_t deeper, Reads outer,
                         Reads inside, Reads gate_slope, Reads forget, Reads hidden_output, Reads normed,
                         Reads rstd, Weight weight_c, Weight weight_h, Weight weight_gate, Reads ln_weight,
                         Reads last, Writes total, Writes gate_change, Writes hidden_change, Writes start) {
                 return GatedAdjoint{span,        hidden,        width,         deeper,
                                     outer,       inside,        gate_slope,    forget,
                                     hidden_output, normed,      rstd,          weight_c,
                                     weight_h,    weight_gate,   ln_weight,     last,
                                     total,       gate_change,   hidden_change, start};
             }),
             py::kw_only(), "span"_a, "hidden"_a, "width"_a, "deeper"_a, "outer"_a, "inside"_a, "gate_slope"_a,
             "forget"_a, "hidden_output"_a, "normed"_a, "rstd"_a, "weight_c"_a, "weight_h"_a, "weight_gate"_a,
             "ln_weight"_a, "last"_a, "total"_a, "gate_change"_a, "hidden_change"_a, "start"_a);
}

#ifdef NEWLLM_WITH_CUDA

// A function that returns an error's text, as one that raises it.
template <class Sweep>
auto raising(const char* (*run)(const Sweep&, const CudaSweepPlan&, const CudaCall&)) {
    return [run](const Sweep& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
        const char* const error = run(sweep, plan, call);
        if (error != nullptr) throw std::runtime_error(std::string("newllm._C: ") + error);
    };
}

SweepDirection direction(bool adjoint) { return adjoint ? SweepDirection::kAdjoint : SweepDirection::kForward; }

void define_cuda(py::module_& module) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    py::class_<CudaSweepPlan>(module, "CudaSweepPlan")
        .def_readonly("kernel", &CudaSweepPlan::kernel)
        .def_readonly("reason", &CudaSweepPlan::reason)
        .def_readonly("workspace", &CudaSweepPlan::workspace);
    py::class_<CudaCall>(module, "CudaCall")
        .def(py::init([](int device, uintptr_t stream, bool bfloat16, uintptr_t workspace) {
                 return CudaCall{device, reinterpret_cast<void*>(stream), bfloat16, nullptr,
                                 reinterpret_cast<void*>(workspace)};
             }),
             py::kw_only(), "device"_a, "stream"_a, "bfloat16"_a, "workspace"_a);
    const auto plan_context = [](bool adjoint, int64_t layers, int64_t width, int64_t runs, bool bfloat16, int device,
                                 bool exact) {
        return plan_context_sweep(direction(adjoint), layers, width, runs, bfloat16, device, exact);
    };
    module.def("plan_context_sweep", plan_context, py::kw_only(), "adjoint"_a, "layers"_a, "width"_a, "runs"_a,
               "bfloat16"_a, "device"_a, "exact"_a = false, unlocked);
    const auto plan_gated = [](bool adjoint, int64_t hidden, int64_t width, int64_t deeper, int64_t runs, bool bfloat16,
                               int device) {
        return plan_gated_sweep(direction(adjoint), hidden, width, deeper, runs, bfloat16, device);
    };
    module.def("plan_gated_sweep", plan_gated, py::kw_only(), "adjoint"_a, "hidden"_a, "width"_a, "deeper"_a, "runs"_a,
               "bfloat16"_a, "device"_a, unlocked);
    module.def("context_forward_cuda", raising(&context_forward_cuda), "sweep"_a, "plan"_a, "call"_a, unlocked);
    module.def("context_adjoint_cuda", raising(&context_adjoint_cuda), "sweep"_a, "plan"_a, "call"_a, unlocked);
    module.def("gated_forward_cuda", raising(&gated_forward_cuda), "sweep"_a, "plan"_a, "call"_a, unlocked);
    module.def("gated_adjoint_cuda", raising(&gated_adjoint_cuda), "sweep"_a, "plan"_a, "call"_a, unlocked);
}

#endif

std::map<std::string, std::string> build_info() {
    return {
        {"compiler", NEWLLM_COMPILER},
        {"cpu", cpu_instructions().front()},
        {"cuda", NEWLLM_CUDA},
    };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    module.doc() = "Context sweeps in C++ and CUDA; see csrc/ and newllm/ops/context_fused.py.";
    module.def("build_info", &build_info, "What this was compiled with and for, and what this machine takes of it.");
    py::class_<Span>(module, "Span")
        .def(py::init([](int64_t batch, int64_t parts, int64_t tokens, int64_t batch_stride, int64_t part_stride) {
                 return Span{batch, parts, tokens, batch_stride, part_stride};
             }),
             py::kw_only(), "batch"_a, "parts"_a, "tokens"_a, "batch_stride"_a, "part_stride"_a);
    define_context(module);
    define_gated(module);
    module.def("cpu_instructions", &cpu_instructions, "Instruction sets that sweeps can be asked to use.");
    module.def("context_forward_cpu", &context_forward_cpu, "sweep"_a, "threads"_a, "instructions"_a = "", unlocked);
    module.def("context_adjoint_cpu", &context_adjoint_cpu, "sweep"_a, "threads"_a, "instructions"_a = "", unlocked);
    module.def("gated_forward_cpu", &gated_forward_cpu, "sweep"_a, "threads"_a, "instructions"_a = "", unlocked);
    module.def("gated_adjoint_cpu", &gated_adjoint_cpu, "sweep"_a, "threads"_a, "instructions"_a = "", unlocked);
#ifdef NEWLLM_WITH_CUDA
    define_cuda(module);
#endif
}

}  // namespace newllm
