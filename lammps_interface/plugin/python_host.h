// Python inside LAMMPS without linking to Python.
//
// About twenty functions of Python's stable ABI are looked up at run time. Where Python already
// runs (`import lammps`) they come from the process itself; where `lmp` is the program, the
// shared libpython recorded at build time is opened and an interpreter of the recorded virtual
// environment is started. One plugin file therefore serves both hosts.

#ifndef MD_PLUGIN_PYTHON_HOST_H
#define MD_PLUGIN_PYTHON_HOST_H

#include <stdexcept>
#include <string>

namespace mdp {

// A Python failure; what() is the text that the user is to read.
struct PythonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Makes sure that an interpreter runs. Throws PythonError.
void start_python();

// True where start_python() had to start the interpreter itself.
bool owns_interpreter();

// A reference to a Python object, taken and dropped under the GIL.
class Object {
 public:
  Object() = default;
  ~Object() { reset(); }
  Object(const Object &) = delete;
  Object &operator=(const Object &) = delete;

  // Replaces this by module.function(address, text). Throws PythonError.
  void create(const char *module, const char *function, void *address, const char *text);

  // self.method(text), the result is dropped. Throws PythonError.
  void call(const char *method, const char *text);

  void reset();

 private:
  void *self = nullptr;
};

}    // namespace mdp

#endif
