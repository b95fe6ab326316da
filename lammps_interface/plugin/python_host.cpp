// Implements python_host.h. See there for the contract.

#include "python_host.h"

#include <dlfcn.h>

#if !defined(MDP_LIBPYTHON) || !defined(MDP_PYTHON)
#error "lammps_interface.build defines MDP_LIBPYTHON and MDP_PYTHON"
#endif

namespace mdp {
namespace {

  struct Api {
    int (*IsInitialized)();
    void (*InitializeEx)(int);
    void (*SetProgramName)(const wchar_t *);
    wchar_t *(*DecodeLocale)(const char *, size_t *);
    void *(*SaveThread)();
    void (*RestoreThread)(void *);
    int (*Ensure)();
    void (*Release)(int);
    void *(*ImportModule)(const char *);
    void *(*CallMethod)(void *, const char *, const char *, ...);
    void *(*Str)(void *);
    const char *(*AsUTF8)(void *, ptrdiff_t *);
    void (*Fetch)(void **, void **, void **);
    void (*Normalize)(void **, void **, void **);
    void (*Clear)();
    void (*DecRef)(void *);
  };

  Api api;
  bool started = false;
  bool owned = false;
  int n_objects = 0;             // that live at present
  void *main_thread = nullptr;    // its state while it has let go of the GIL

  template <typename F> void look_up(void *library, const char *name, F &function)
  {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function)
      throw PythonError(std::string("this Python does not offer the function ") + name +
                        "; md_plugin is tested with Python 3.11 and 3.12");
  }

  void look_up_all(void *library)
  {
    look_up(library, "Py_IsInitialized", api.IsInitialized);
    look_up(library, "PyEval_SaveThread", api.SaveThread);
    look_up(library, "PyEval_RestoreThread", api.RestoreThread);
    look_up(library, "PyGILState_Ensure", api.Ensure);
    look_up(library, "PyGILState_Release", api.Release);
    look_up(library, "PyImport_ImportModule", api.ImportModule);
    look_up(library, "PyObject_CallMethod", api.CallMethod);
    look_up(library, "PyObject_Str", api.Str);
    look_up(library, "PyUnicode_AsUTF8AndSize", api.AsUTF8);
    look_up(library, "PyErr_Fetch", api.Fetch);
    look_up(library, "PyErr_NormalizeException", api.Normalize);
    look_up(library, "PyErr_Clear", api.Clear);
    look_up(library, "Py_DecRef", api.DecRef);
  }

  void *open_libpython()
  {
    const std::string path = MDP_LIBPYTHON;
    const std::string remedy = "run the same script with Python as the program instead: "
                               "md-plugin lmp -sf py -in in.script";
    if (path.empty())
      throw PythonError("the interpreter " MDP_PYTHON " has no shared libpython, so lmp cannot "
                        "start it; " + remedy);
    // RTLD_GLOBAL: numpy, torch and other extension modules are not linked to libpython, they
    // expect to find its symbols in the process.
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (!library)
      throw PythonError("cannot load " + path + " (" + dlerror() + "); " + remedy);
    return library;
  }

  void embed()
  {
    void *library = open_libpython();
    look_up_all(library);
    if (api.IsInitialized()) return;
    look_up(library, "Py_InitializeEx", api.InitializeEx);
    look_up(library, "Py_SetProgramName", api.SetProgramName);
    look_up(library, "Py_DecodeLocale", api.DecodeLocale);
    // The program name decides sys.prefix: pyvenv.cfg beside the interpreter is found from it.
    // Python keeps the pointer, so the string is never freed.
    api.SetProgramName(api.DecodeLocale(MDP_PYTHON, nullptr));
    api.InitializeEx(0);    // 0: Ctrl-C stays with LAMMPS
    // Not finalised here: numpy and torch do not survive it, and their worker threads may still
    // hold references at that point. A LAMMPS with the PYTHON package does so at its end.
    owned = true;
  }

  // While there are objects any thread may take the GIL. Before and after, the main thread holds
  // it, as a LAMMPS with the PYTHON package expects when it finalises Python.
  void count_objects(int change)
  {
    n_objects += change;
    if (!owned) return;
    if (n_objects > 0 && !main_thread) main_thread = api.SaveThread();
    if (n_objects == 0 && main_thread) {
      api.RestoreThread(main_thread);
      main_thread = nullptr;
    }
  }

  class Gil {
   public:
    Gil() : state(api.Ensure()) {}
    ~Gil() { api.Release(state); }
    Gil(const Gil &) = delete;
    Gil &operator=(const Gil &) = delete;

   private:
    int state;
  };

  // Needs the GIL. Empties Python's error indicator.
  std::string error_text()
  {
    void *type = nullptr, *value = nullptr, *trace = nullptr;
    api.Fetch(&type, &value, &trace);
    api.Normalize(&type, &value, &trace);
    std::string text = "Python failed without a message";
    if (void *str = value ? api.Str(value) : nullptr) {
      const char *utf8 = api.AsUTF8(str, nullptr);
      if (utf8 && *utf8) text = utf8;
      api.DecRef(str);
    }
    api.Clear();
    for (void *object : {type, value, trace})
      if (object) api.DecRef(object);
    return text;
  }

}    // namespace

void start_python()
{
  if (started) return;
  auto is_initialized = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "Py_IsInitialized"));
  if (is_initialized && is_initialized())
    look_up_all(RTLD_DEFAULT);
  else
    embed();
  started = true;
}

bool owns_interpreter()
{
  return owned;
}

void Object::create(const char *module, const char *function, void *address, const char *text)
{
  reset();
  {
    Gil gil;
    void *imported = api.ImportModule(module);
    if (!imported)
      throw PythonError("cannot import " + std::string(module) + " (" + error_text() +
                        "); is md_plugin installed in the Python environment of this LAMMPS?");
    const auto where = static_cast<unsigned long long>(reinterpret_cast<size_t>(address));
    self = api.CallMethod(imported, function, "Ks", where, text);
    api.DecRef(imported);
    if (!self) throw PythonError(error_text());
  }
  count_objects(1);
}

void Object::call(const char *method, const char *text)
{
  Gil gil;
  void *result = api.CallMethod(self, method, "s", text);
  if (!result) throw PythonError(error_text());
  api.DecRef(result);
}

void Object::reset()
{
  if (!self) return;
  // After Python has ended (an exiting Python host) its objects are gone already.
  if (api.IsInitialized()) {
    {
      Gil gil;
      api.DecRef(self);
    }
    count_objects(-1);
  }
  self = nullptr;
}

}    // namespace mdp
